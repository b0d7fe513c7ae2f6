"""Which block has which phase: in their order, or spread over the blocks of each stage."""

from __future__ import annotations

from collections import Counter

import pytest

from nlscale.config import recipe
from nlscale.config.choices import Phases
from nlscale.config.phases import order
from nlscale.levels.spectrum import Level, levels_of, phase, sync_group


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 24, 32, 45, 48, 80])
def test_each_block_has_a_place_of_its_own_and_both_ends_keep_theirs(layers: int) -> None:
    places = [order(depth, layers, Phases.interleaved) for depth in range(layers)]
    assert sorted(places) == [*range(layers)]
    assert (places[0], places[-1]) == (0, layers - 1)
    assert [order(depth, layers, Phases.by_depth) for depth in range(layers)] == [*range(layers)]


@pytest.mark.parametrize(
    ("layers", "stages", "period"), [(24, 2, 4), (24, 8, 3), (32, 4, 8), (48, 16, 3), (80, 8, 10)]
)
def test_a_stage_has_an_even_share_of_every_phase(layers: int, stages: int, period: int) -> None:
    level = Level(0, "slow", period, 1.0, phases=Phases.interleaved)
    each = layers // stages
    for first in range(0, layers, each):
        depths = range(first, first + each)
        phases = Counter(phase(level, depth, layers, stagger=True) for depth in depths)
        assert phases == dict.fromkeys(range(period), each // period)
    assert {phase(level, depth, layers, stagger=False) for depth in range(layers)} == {0}


def test_all_stages_together_send_as_much_at_each_step_as_in_the_other_order() -> None:
    groups = []
    for phases in ("by_depth", "interleaved"):
        keys = ["data.dir=none", "levels=[1,4,12]", "model.layers=12", f"levels.phases={phases}"]
        config = recipe.load(None, keys).config
        levels = levels_of(config)
        groups.append(
            Counter(
                sync_group(level, depth, 12, config.levels.stagger)
                for level in levels
                for depth in range(12)
            )
        )
    assert groups[0] == groups[1]

"""Levels whose windows hold steps of different sizes: still the mean over all their targets."""

from __future__ import annotations

from typing import Any

import pytest
import world
from levels.level_runs import largest_difference, run_engine, run_oracle

from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, tokens_until
from nlscale.errors import UserError
from nlscale.levels.spectrum import SyncGroup, levels_of

GROWS = [
    "levels=[1,3,5]",
    "train.steps=11",
    "train.global_batch=[{from: 0, size: 4}, {from: 4 steps, size: 8}, {from: 60%, size: 12}]",
    "data.sequence_length=9",
    "data.stages=[{from: 8 steps, sequence_length: 21}]",
    "optimizer.clip=0.05",
]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    (found,) = world.run(1, run_oracle, GROWS)
    return found


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2)])
def test_a_batch_that_grows_inside_a_window_is_that_of_a_plain_process(
    oracle: dict[str, Any], ranks: int, per_node: int
) -> None:
    results = world.run(ranks, run_engine, GROWS, ranks_per_node=per_node)
    assert results[0]["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
    assert largest_difference(results[0]["parameters"], oracle["parameters"]) <= 1e-6


def test_a_period_in_tokens_is_refused_where_steps_differ_in_them() -> None:
    def levels(*overrides: str) -> list[int]:
        config = recipe.load(None, ["data.dir=none", "train.steps=10", *overrides]).config
        return [level.period for level in levels_of(config)]

    grows = "train.global_batch=[{from: 0, size: 4}, {from: 50%, size: 8}]"
    assert levels("levels=[1, 64k tokens]", "train.global_batch=4") == [1, 16]
    assert levels("levels=[1,16]", grows) == [1, 16]
    with pytest.raises(
        UserError, match=r"levels.spectrum.1.period '64k tokens' is in tokens.*in s"
    ):
        levels("levels=[1, 64k tokens]", grows)
    # half as many sequences, twice as long: the same tokens a step
    halves = "train.global_batch=[{from: 0, size: 4}, {from: 50%, size: 2}]"
    twice = "data.stages=[{from: 50%, sequence_length: 2048}]"
    assert levels("levels=[1, 64k tokens]", halves, twice) == [1, 16]


def test_a_window_is_full_when_it_holds_the_tokens_of_its_own_steps() -> None:
    config = recipe.load(None, ["data.dir=none", *GROWS]).config
    stages = curriculum(config)
    group = SyncGroup(level=1, phase=2, period=5)  # closes after steps 2, 7, 12
    each = [4 * 9] * 4 + [8 * 9] * 3 + [12 * 9] + [12 * 21] * 3
    for step in range(1, 7):
        wanted = sum(each[2:7]) if step >= 2 else sum(each[:2]) + 3 * each[0]
        assert group.window_tokens(step, lambda n: tokens_until(stages, n)) == wanted

"""Pipeline stages: where the stack of blocks is cut."""

from __future__ import annotations

import pytest

from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.model.stages import stage_blocks


def cut(*overrides: str, vocabulary: int = 0) -> list[int]:
    config = recipe.load(None, ["data.dir=none", "model.d_model=64", "model.heads=2", *overrides])
    blocks = stage_blocks(config.config, vocabulary)
    starts = [b.start for b in blocks]
    assert starts[0] == 0 and starts[1:] == [b.stop for b in blocks[:-1]]  # nothing left out
    return [len(b) for b in blocks]


def test_without_a_vocabulary_stages_are_equal() -> None:
    assert cut("model.layers=12", "parallel.pipeline=4") == [3, 3, 3, 3]
    assert cut("model.layers=8", "parallel.pipeline=2", "parallel.virtual_stages=2") == [2] * 4
    assert cut("model.layers=5") == [5]


def test_the_head_and_the_embedding_take_room_from_their_stages() -> None:
    # a block has about 12 d^2 weights: this head weighs as much as two blocks, the embedding as one
    sizes = cut("model.layers=13", "parallel.pipeline=4", vocabulary=2 * 12 * 64)
    assert sizes == [3, 4, 4, 2]
    assert sum(sizes) == 13


def test_a_head_heavier_than_a_stage_still_leaves_it_one_block() -> None:
    assert cut("model.layers=4", "parallel.pipeline=2", vocabulary=100_000) == [3, 1]


def test_stages_can_be_given() -> None:
    given = ["model.layers=7", "parallel.pipeline=2", "parallel.stages=[5,2]"]
    assert cut(*given, vocabulary=10_000) == [5, 2]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.pipeline=4"], "model.layers 3 are fewer than the 4 stages"),
        (["parallel.pipeline=2", "parallel.stages=[2,2]"], "2 numbers .*with sum 3"),
        (["parallel.pipeline=2", "parallel.stages=[3,0]"], "stages is 0; it must be above 0"),
        (["parallel.pipeline=2", "parallel.stages=[3]"], "must be 2 numbers"),
        (["parallel.stages=[]"], "must be 1 numbers"),
    ],
)
def test_stages_that_do_not_fit_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        cut("model.layers=3", *overrides)

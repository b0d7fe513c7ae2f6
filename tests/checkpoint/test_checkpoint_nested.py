"""Copies of MLPs, of the nested form of CMS, in checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train
from checkpoint.test_checkpoint_resume import saved_only_at
from levels.level_runs import VOCABULARY, load
from levels.test_levels_nested import THREE

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.inspection import inspection
from nlscale.cluster.machines import Cluster
from nlscale.levels.spectrum import levels_of
from nlscale.plan.checkpoint import checkpoint_plan

STEPS, SAVED = 9, 6
"""Saved within a window of every copy, and in one block also of its MLP."""
RUN = [*THREE, f"train.steps={STEPS}", "checkpoint.pending=canonical"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run on two nodes that never stopped, with a step that was dropped."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    world.run(2, train, RUN, folder, (SAVED,), False, (4,), ranks_per_node=1)
    return folder


def test_resuming_within_windows_of_copies_is_bitwise(tmp_path: Path, whole: Path) -> None:
    rest = saved_only_at(whole, SAVED, tmp_path / "rest")
    begun = checkpoint(rest, SAVED)
    levels = begun.state["levels"]
    assert {own["updates"] for own in levels if own["level"] == 1} == {1}
    assert all(own["tokens"] for own in levels if own["level"] > 0)
    kinds = {name.partition("/")[0] for name in begun.tensors()}
    assert kinds >= {"level_copy_1", "level_copy_2", "window", "exp_avg"}
    world.run(2, train, RUN, rest, (), True, ranks_per_node=1)
    result = compare(checkpoint(rest, STEPS), checkpoint(whole, STEPS))
    assert result["bitwise"], result


def test_other_ranks_load_the_very_same_copies(tmp_path: Path, whole: Path) -> None:
    again = saved_only_at(whole, SAVED, tmp_path / "again")
    world.run(2, load_and_save, [*RUN, "parallel.tensor=2"], again, ranks_per_node=2)
    result = compare(checkpoint(again, SAVED), checkpoint(whole, SAVED))
    assert result["bitwise"], result


def test_a_checkpoint_with_copies_has_the_planned_bytes_and_is_described(whole: Path) -> None:
    found, config = checkpoint(whole, SAVED), load([*RUN, "model.vocabulary=32"])
    planned = checkpoint_plan(
        config, levels_of(config), VOCABULARY, Cluster("two", 2, 1, 10.0, 80.0, None), 2
    )
    stored = sum(info.bytes for info in found.tensors().values())
    # at most: of the second block the window of the MLP is not open
    closed = {own["phase"] for own in found.state["levels"] if own["level"] == 0 and own["tokens"]}
    assert closed == {1}
    lacking = sum(
        info.bytes
        for name, info in found.tensors().items()
        if name.startswith("weights/") and f"window/{name.partition('/')[2]}" not in found.tensors()
    )
    assert planned.bytes == stored + lacking
    assert [level["updates"] for level in inspection(found)["levels"]][1:] == [1, 0]

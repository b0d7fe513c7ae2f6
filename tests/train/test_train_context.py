"""Levels that change inside the context, trained by the command: resumed, and on two stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import world
from train.test_train_resume import only_until
from train.test_train_run import records, run, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Checkpoint, Store

CONTEXT = [
    "levels=[{name: fast, context: {chunk: 8, learning_rate: 5, blocks: 2}}, "
    "{name: slow, period: 4, context: {chunk: 4, learning_rate: 5, decay: 0.9}}]",
    "train.steps=7", "checkpoint.every=6 steps", "train.validate_every=99", "train.global_batch=4",
    "optimizer.learning_rate=0.01", "optimizer.warmup_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=6, held_out=0.2)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("run")
    (summary,) = world.run(1, run, [*CONTEXT, f"data.dir={data}", f"run.dir={folder}"])
    assert summary["steps"] == 7, summary
    return folder


def losses(folder: Path) -> list[float]:
    return [one["loss"] for one in records(folder, "train")]


def test_it_learns_through_the_change_and_goes_on_in_mid_window(data: Path, whole: Path) -> None:
    first = losses(whole)
    assert first[-1] < first[0] - 0.3
    names = [f"weights/blocks.1.cms.contexts.{i}.target.weight" for i in (0, 1)]
    last = Store(whole / "checkpoints").checkpoints()[-1]
    assert set(names) <= set(last.tensors())
    # the slow level's window of steps 5 to 8 is open at step 6
    only_until(whole, 6)
    (again,) = world.run(1, run, [*CONTEXT, f"data.dir={data}", f"run.dir={whole}"])
    assert again["steps"] == 7 and losses(whole) == first
    resumed = Store(whole / "checkpoints").checkpoints()[-1]
    assert compare(resumed, Checkpoint(whole / "later-7", 7))["bitwise"]


def test_two_pipeline_stages_train_what_one_does(data: Path, whole: Path, tmp_path: Path) -> None:
    here = [*CONTEXT, f"data.dir={data}", f"run.dir={tmp_path}", "parallel.pipeline=2"]
    summaries = world.run(2, run, here)
    assert summaries[0]["steps"] == 7, summaries
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)

"""Checkpoints of levels in host memory are those of levels on the device, and resume as either."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Checkpoint

BASE = [
    "train.steps=7", "data.sequence_length=8", "train.global_batch=2", "model.layers=2",
    "tiers.ring_mib=0.0625", "train.dtype=bf16",
]  # fmt: skip
WHERE = {
    "hbm": "levels=[{period: 1}, {period: 4}]",
    "host": "levels=[{period: 1}, {period: 4, memory: host}]",
    "all host": "levels=[{period: 1, memory: host}, {period: 4, memory: host}]",
}
IN_MID_WINDOW = 5


@pytest.mark.parametrize("ranks", [1, 2])  # two are two nodes
def test_a_run_resumes_bitwise_across_a_change_of_memory(tmp_path: Path, ranks: int) -> None:
    def run(memory: str, folder: Path, resumes: bool) -> dict:
        given = ([*BASE, WHERE[memory]], folder, (IN_MID_WINDOW,), resumes, (3,))
        return world.run(ranks, train, *given, ranks_per_node=1)[0]

    whole = run("hbm", tmp_path / "hbm", False)
    host = run("all host", tmp_path / "host", False)
    assert repr(host["losses"]) == repr(whole["losses"])  # one of them is of no step
    for step in (IN_MID_WINDOW, 7):
        assert_same(*(checkpoint(tmp_path / name, step) for name in ("hbm", "host")))
    for before, after in (("host", "hbm"), ("hbm", "host")):
        folder = saved_in_mid_window(tmp_path / before, tmp_path / f"{before}-{after}")
        resumed = run(after, folder, True)
        assert {s: resumed["losses"][s] for s in (6, 7)} == {s: whole["losses"][s] for s in (6, 7)}
        for name, tensor in whole["parameters"].items():
            assert torch.equal(tensor, resumed["parameters"][name]), name
        assert_same(*(checkpoint(found, 7) for found in (tmp_path / "hbm", folder)))


def test_another_layout_and_memory_load_the_very_same_state(tmp_path: Path) -> None:
    spread = ["parallel.shard_optimizer=all", WHERE["all host"]]
    world.run(2, train, [*BASE, *spread], tmp_path / "a", (IN_MID_WINDOW,), ranks_per_node=1)
    again = saved_in_mid_window(tmp_path / "a", tmp_path / "b")
    keys = ["parallel.tensor=2", WHERE["host"]]
    world.run(2, load_and_save, [*BASE, *keys], again, ranks_per_node=2)
    assert_same(*(checkpoint(tmp_path / name, IN_MID_WINDOW) for name in "ab"))


def saved_in_mid_window(run: Path, folder: Path) -> Path:
    """A folder with what a run that was killed in the middle of a window leaves."""
    folder.mkdir()
    saved = checkpoint(run, IN_MID_WINDOW).path
    shutil.copytree(saved, folder / saved.name)
    return folder


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    found = compare(one, other)
    assert found["bitwise"], found

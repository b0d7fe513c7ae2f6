"""Checkpoints of levels in host memory are those of levels on the device, and resume as either."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train
from disks import Disk, small_disk
from ops.plain_ops import PlainAsyncIo, stand_in

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import LATEST, Checkpoint

BASE = [
    "train.steps=7", "data.sequence_length=8", "train.global_batch=2", "model.layers=2",
    "tiers.ring_mib=0.0625", "train.dtype=bf16",
]  # fmt: skip
WHERE = {
    "hbm": "levels=[{period: 1}, {period: 4}]",
    "host": "levels=[{period: 1}, {period: 4, memory: host}]",
    "all host": "levels=[{period: 1, memory: host}, {period: 4, memory: host}]",
    "nvme": "levels=[{period: 1, memory: host}, {period: 4, memory: nvme}]",
}
IN_MID_WINDOW = 5


CHANGES = [("host", "hbm"), ("nvme", "host"), ("hbm", "nvme")]


@pytest.mark.parametrize(
    ("ranks", "tensor", "changes"),
    [(1, 1, CHANGES), (4, 2, CHANGES[1:])],  # four are two nodes
)
def test_a_run_resumes_bitwise_across_a_change_of_memory(
    tmp_path: Path, ranks: int, tensor: int, changes: list[tuple[str, str]]
) -> None:
    def run(memory: str, folder: Path, resumes: bool) -> dict:
        keys = [*BASE, WHERE[memory], f"tiers.folder={slots}", f"parallel.tensor={tensor}"]
        given = (keys, folder, (IN_MID_WINDOW,), resumes, (3,))
        return world.run(ranks, on_a_drive, None, train, *given, ranks_per_node=tensor)[0]

    slots = tmp_path / "slots"
    slots.mkdir()

    whole = run("hbm", tmp_path / "hbm", False)
    begun = {before for before, _ in changes}
    for memory, name in (("all host", "host"), ("nvme", "nvme")):
        if name not in begun:
            continue
        moved = run(memory, tmp_path / name, False)
        assert repr(moved["losses"]) == repr(whole["losses"])  # one of them is of no step
        for step in (IN_MID_WINDOW, 7):
            assert_same(*(checkpoint(tmp_path / where, step) for where in ("hbm", name)))
    for before, after in changes:
        folder = saved_in_mid_window(tmp_path / before, tmp_path / f"{before}-{after}")
        resumed = run(after, folder, True)
        assert {s: resumed["losses"][s] for s in (6, 7)} == {s: whole["losses"][s] for s in (6, 7)}
        for name, values in whole["parameters"].items():
            assert torch.equal(values, resumed["parameters"][name]), name
        assert_same(*(checkpoint(found, 7) for found in (tmp_path / "hbm", folder)))


def test_another_layout_and_memory_load_the_very_same_state(tmp_path: Path) -> None:
    spread = ["parallel.shard_optimizer=all", WHERE["all host"]]
    world.run(2, train, [*BASE, *spread], tmp_path / "a", (IN_MID_WINDOW,), ranks_per_node=1)
    again = saved_in_mid_window(tmp_path / "a", tmp_path / "b")
    keys = ["parallel.tensor=2", WHERE["host"]]
    world.run(2, load_and_save, [*BASE, *keys], again, ranks_per_node=2)
    assert_same(*(checkpoint(tmp_path / name, IN_MID_WINDOW) for name in "ab"))


@pytest.mark.parametrize(("kind", "number"), [("read", 2), ("half", 2), ("written", 2)])
def test_a_run_that_is_killed_at_a_write_back_goes_on_from_its_checkpoint(
    tmp_path: Path, whole: Path, kind: str, number: int
) -> None:
    slots = tmp_path / "slots"
    slots.mkdir()
    keys = [*BASE, WHERE["nvme"], f"tiers.folder={slots}"]
    goes_on = train, keys, saved_in_mid_window(whole, tmp_path / "run"), (), True
    with pytest.raises(AssertionError, match="ended without a result, exit code -9"):
        world.run(1, on_a_drive, (kind, number), *goes_on)
    assert not [*slots.iterdir()]
    world.run(1, on_a_drive, None, *goes_on)
    assert_same(checkpoint(whole, 7), checkpoint(tmp_path / "run", 7))


@pytest.mark.root
def test_a_drive_that_fills_up_under_a_run_and_its_checkpoints_loses_no_state(
    tmp_path: Path, whole: Path
) -> None:
    """A real one, past the page cache: levels go on in the room they have, to the end."""
    with small_disk(tmp_path, 16) as disk:
        run, keys = disk.folder / "run", [*BASE, WHERE["nvme"], f"tiers.folder={disk.folder}"]
        said = "step 7 was not written.* 0 B free, about .* the checkpoints before it are whole"
        with pytest.raises(AssertionError, match=said):
            world.run(1, on_a_full_drive, disk, True, keys, run, (IN_MID_WINDOW,))
        seen = disk.seen / "run"
        assert [path.name for path in seen.glob("step-*")] == [f"step-{IN_MID_WINDOW:08d}"]
        assert_same(checkpoint(whole, IN_MID_WINDOW), checkpoint(seen, IN_MID_WINDOW))
        disk.filler.unlink()
        world.run(1, on_a_full_drive, disk, False, keys, run, (), True)
        assert_same(checkpoint(whole, 7), checkpoint(seen, 7))


def on_a_full_drive(disk: Disk, fills: bool, keys: list[str], run: Path, *given: Any) -> None:
    """On a rank of a world: train there; it is full from the first write after the checkpoint."""
    disk.enter()
    stand_in()
    PlainAsyncIo.flags = os.O_DIRECT
    before = 2  # writes until then, of two groups: at steps 2 and 4

    def fill(kind: str, number: int, path: str) -> None:
        if kind == "write" and fills and number > before and not disk.filler.exists():
            ends = time.monotonic() + 60
            while not (run / LATEST).exists():  # it is written beside the training
                assert time.monotonic() < ends
                time.sleep(0.01)
            disk.fill()

    PlainAsyncIo.fault = staticmethod(fill)
    train(keys, run, *given)
    assert not fills, "the last checkpoint was written"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the device, whole."""
    folder = tmp_path_factory.mktemp("whole")
    world.run(1, train, [*BASE, WHERE["hbm"]], folder, (IN_MID_WINDOW,))
    return folder


def on_a_drive(fault: tuple[str, int] | None, run: Callable[..., Any], *given: Any) -> Any:
    """On a rank of a world: what the run returns, on plain reads and writes; killed at one."""

    def kill(kind: str, number: int, path: str) -> None:
        if fault == ("half", number) and kind == "write":
            with open(path, "r+b") as file:
                file.write(bytes(5000))
        if fault in ((kind, number), ("half" if kind == "write" else None, number)):
            os.kill(os.getpid(), signal.SIGKILL)

    stand_in()
    PlainAsyncIo.fault = staticmethod(kill)
    return run(*given)


def saved_in_mid_window(run: Path, folder: Path) -> Path:
    """A folder with what a run that was killed in the middle of a window leaves."""
    folder.mkdir()
    saved = checkpoint(run, IN_MID_WINDOW).path
    shutil.copytree(saved, folder / saved.name)
    return folder


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    found = compare(one, other)
    assert found["bitwise"], found

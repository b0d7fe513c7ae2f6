"""What is fetched from a mirror is whole, whatever the mirror holds and wherever it is stopped."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import world
from checkpoint import stores
from checkpoint.mirror.mirrors import saved

from nlscale.checkpoint.mirror.copy import Progress, copy
from nlscale.checkpoint.mirror.fetch import fetch_newest
from nlscale.checkpoint.mirror.remote import LATEST, MANIFEST, Remote, folder_of
from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.store import CheckpointError, Store


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A folder as a mirror, with checkpoints of steps 1 and 2."""
    path = tmp_path / "mirror"
    remote = Remote(f"file://{path}")
    for step in (1, 2):
        _mirrored(remote, tmp_path / "run", step)
    return path


def _mirrored(remote: Remote, folder: Path, step: int) -> None:
    assert copy(saved(folder, step), remote, Progress(step), lambda: None)


def _fetch(mirror: Path, folder: Path, said: list[str] | None = None) -> int | None:
    """The step of what is fetched, which must be whole and what was saved."""
    say = (lambda line: None) if said is None else said.append
    found = fetch_newest(f"file://{mirror}", Store(folder), None, say)
    if found is None:
        return None
    assert stores.holds(found, found.step)
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, folder_of(found.step)]
    newest = Store(folder).newest_valid(pytest.fail)
    assert newest is not None and newest.step == found.step
    return found.step


def test_the_newest_is_fetched_where_there_is_none(mirror: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert _fetch(mirror, tmp_path / "new" / "checkpoints", said) == 2
    assert len(said) == 2
    assert said[0].endswith(f"fetching that of step 2 from file://{mirror}, 23.8 kB")
    assert said[1].startswith(f"checkpoint of step 2 fetched from file://{mirror}: 23.8 kB in ")


def test_nothing_is_fetched_where_there_is_one_whole_or_not(mirror: Path, tmp_path: Path) -> None:
    stores.save(tmp_path / "store", 1, seed=9)
    stores.flip(tmp_path / "store" / "step-00000001" / "__0_0.distcp", 5)
    assert _fetch(mirror, tmp_path / "store") is None
    shutil.rmtree(tmp_path / "store" / "step-00000001")
    assert _fetch(mirror, tmp_path / "store") == 2


def test_nothing_is_fetched_from_an_empty_mirror(tmp_path: Path) -> None:
    assert _fetch(tmp_path / "none", tmp_path / "store") is None
    assert not (tmp_path / "store").exists()


def test_newer_ones_than_the_run_went_on_with_are_the_last_resort(
    mirror: Path, tmp_path: Path
) -> None:
    """A resume passed them over; what was copied after it is what the run is."""
    _mirrored(Remote(f"file://{mirror}"), tmp_path / "run", 9)
    (mirror / LATEST).write_text("step-00000002\n")
    assert _fetch(mirror, tmp_path / "store") == 2
    for step in (1, 2):
        (mirror / folder_of(step) / MANIFEST).unlink()
    assert _fetch(mirror, tmp_path / "another") == 9


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: stores.flip(path / "__0_0.distcp", 99),
    "truncated": lambda path: os.truncate(path / "__0_0.distcp", 99),
    "longer": lambda path: (path / "state.json").open("ab").write(b" "),
    "missing": lambda path: (path / ".metadata").unlink(),
    "manifest altered": lambda path: stores.flip(path / MANIFEST, 40),
    "manifest of another": lambda path: (path / MANIFEST).write_bytes(
        (path.parent / "step-00000001" / MANIFEST).read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_broken_in_the_mirror_is_passed_over(
    mirror: Path, tmp_path: Path, damage: str
) -> None:
    DAMAGE[damage](mirror / "step-00000002")
    said: list[str] = []
    assert _fetch(mirror, tmp_path / "store", said) == 1
    (line,) = [line for line in said if "is broken" in line]
    assert line.startswith("checkpoint of step 2 in the mirror is broken, trying step 1: file://")
    assert "step-00000002" in line
    DAMAGE["flipped"](mirror / "step-00000001")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in file://.* is whole: "):
        _fetch(mirror, tmp_path / "another")
    assert Store(tmp_path / "another").newest_valid(pytest.fail) is None


def test_stopped_after_any_operation(mirror: Path, tmp_path: Path) -> None:
    for k in itertools.count(1):
        folder = tmp_path / f"{k}" / "checkpoints"
        folder.parent.mkdir()
        killed = stores.dies_after(k, lambda folder=folder: _fetch(mirror, folder))
        found = Store(folder).newest_valid(pytest.fail)  # nothing looks finished and is not
        assert found is None or (found.step == 2 and stores.holds(found, 2))
        if not killed:
            break
        if found is None:
            assert _fetch(mirror, folder) == 2
    assert k > 20 and found is not None


def _fails(mirror: Path, folder: Path, rank: int, number: int) -> str:
    """The error of a fetch of which an operation fails on a rank: the same on every rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    left = [number]

    def fail(operation: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error", operation)

    files.on_operation = fail if dist.get_rank() == rank else files._nothing
    said = ""
    try:
        fetch_newest(f"file://{mirror}", Store(folder), dist.group.WORLD, lambda line: None)
    except CheckpointError as error:
        said = str(error)
    files.on_operation = files._nothing
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    assert len(set(everywhere)) == 1
    return said


def _every_operation_fails(mirror: Path, folder: Path) -> int:
    os.fsync = lambda file: None
    count = 0
    for rank in range(2):
        for number in itertools.count(1):
            store = Store(folder / f"{rank}-{number}")
            said = _fails(mirror, store.folder, rank, number)
            if not said:
                break
            count += 1
            assert "cannot fetch the checkpoint of step 2 from checkpoint.mirror file:" in said
            assert f"rank {rank} on " in said and "Input/output error" in said
            found = store.newest_valid(pytest.fail)
            assert found is None or stores.holds(found, 2)
            assert not list(store.folder.glob("*.partial"))
            dist.barrier()
    return count


def test_an_operation_that_fails_on_one_of_two_ranks(mirror: Path, tmp_path: Path) -> None:
    counts = world.run(2, _every_operation_fails, mirror, tmp_path / "stores")
    assert counts[0] == counts[1] > 20

"""A writer killed after any of its file operations leaves a whole checkpoint to be found."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint import stores

from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.store import Store


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written stays: only a power cut asks for it to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def _finds(folder: Path, *saved: tuple[int, int]) -> int:
    """The step of the newest valid checkpoint, which must be one of `saved` (step, seed)."""
    said: list[str] = []
    found = Store(folder).newest_valid(said.append)
    assert found is not None and said == []
    assert any(found.step == step and stores.holds(found, seed) for step, seed in saved)
    return found.step


def _tidies(folder: Path, step: int, seed: int) -> None:
    """Saving again and pruning works, and nothing else is left."""
    stores.save(folder, step, seed)
    Store(folder).prune(keep=1, keep_every=None)
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", f"step-{step:08d}"]
    assert _finds(folder, (step, seed)) == step


def test_killed_while_saving(tmp_path: Path) -> None:
    stores.save(tmp_path / "one", 1, seed=1)
    found = []
    for k in itertools.count(1):
        folder = shutil.copytree(tmp_path / "one", tmp_path / f"{k}")
        if not stores.dies_after(k, lambda folder=folder: stores.save(folder, 2, seed=2)):
            break
        found.append(_finds(folder, (1, 1), (2, 2)))
        _tidies(folder, 2, seed=3)
    # before a certain operation, the rename, it is the old one, then the new one
    assert len(found) > 20 and found == sorted(found) and set(found) == {1, 2}


def test_killed_while_saving_the_first(tmp_path: Path) -> None:
    for k in itertools.count(1):
        folder = tmp_path / f"{k}" / "checkpoints"
        if not stores.dies_after(k, lambda folder=folder: stores.save(folder, 1, seed=1)):
            break
        if Store(folder).checkpoints():
            _finds(folder, (1, 1))
        else:
            assert Store(folder).newest_valid(pytest.fail) is None
        _tidies(folder, 1, seed=3)
    assert k > 20


def test_killed_while_replacing_and_killed_again(tmp_path: Path) -> None:
    """The only checkpoint there is is saved anew; so is it where the first attempt was killed."""
    stores.save(tmp_path / "one", 2, seed=1)
    states: dict[tuple[str, ...], Path] = {}
    for k in itertools.count(1):
        folder = shutil.copytree(tmp_path / "one", tmp_path / f"{k}")
        if not stores.dies_after(k, lambda folder=folder: stores.save(folder, 2, seed=2)):
            break
        _finds(folder, (2, 1), (2, 2))
        names = tuple(sorted(path.name for path in folder.iterdir()))
        if any(name.endswith((".replaced", ".deleted")) for name in names):
            states.setdefault(names, folder)
    assert ("LATEST", "step-00000002.partial", "step-00000002.replaced") in states
    for left in states.values():
        for k in itertools.count(1):
            folder = shutil.copytree(left, tmp_path / "again")
            killed = stores.dies_after(k, lambda folder=folder: stores.save(folder, 2, seed=3))
            _finds(folder, (2, 1), (2, 2), (2, 3))
            if k % 5 == 0:
                _tidies(folder, 2, seed=4)
            shutil.rmtree(folder)
            if not killed:
                break


def test_killed_while_pruning(tmp_path: Path) -> None:
    for step in range(1, 7):
        stores.save(tmp_path / "all", step, seed=step)
    (tmp_path / "all" / "step-00000004.partial").mkdir()
    (tmp_path / "all" / "step-00000004.partial" / "__0_0.distcp").touch()
    prune: Callable[[Path], object] = lambda folder: Store(folder).prune(keep=2, keep_every=3)  # noqa: E731
    for k in itertools.count(1):
        folder = shutil.copytree(tmp_path / "all", tmp_path / f"{k}")
        killed = stores.dies_after(k, lambda folder=folder: prune(folder))
        # what still looks like a checkpoint is whole
        for checkpoint in Store(folder).checkpoints():
            assert stores.holds(checkpoint, checkpoint.step)
        assert _finds(folder, (6, 6)) == 6
        prune(folder)
        kept = ["LATEST", "step-00000003", "step-00000005", "step-00000006"]
        assert sorted(path.name for path in folder.iterdir()) == kept
        if not killed:
            break
    assert k > 15


def test_a_name_is_given_only_to_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this order a power cut, unlike a kill, could leave a name for lost contents."""
    stores.save(tmp_path / "runs", 1, seed=1)
    done: list[str] = []
    monkeypatch.setattr(files, "on_operation", done.append)
    stores.save(tmp_path / "runs", 2, seed=2)
    finished = done.index("rename step-00000002.partial")
    contents = ["__0_0.distcp", ".metadata.tmp", "state.json", "manifest.json"]
    for name in contents:
        last_write = max(i for i, one in enumerate(done) if one == f"write {name}")
        assert last_write < done.index(f"sync {name}") < finished
    synced = [done.index(f"sync {name}") for name in contents]
    assert synced == sorted(synced)  # the manifest vouches for what is on the disk
    assert synced[-1] < done.index("sync step-00000002.partial") < finished
    # and LATEST names only what has its name
    assert done[finished + 1 :] == [
        "sync runs",
        *("create LATEST.tmp", "write LATEST.tmp", "sync LATEST.tmp", "rename LATEST.tmp"),
        "sync runs",
    ]

"""Ranks verify a checkpoint together: what is broken for all of them is, and nothing else."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch.distributed as dist
import world
from checkpoint import stores

from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.store import Store
from nlscale.checkpoint.store.together import Ranks
from nlscale.errors import Stopped


def verify(folder: Path, what: str) -> tuple[str, list[str]]:
    """What comes of it on this rank: the step, or the kind of error and its text; what was said."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    own = files.digest

    def digest(path: Path) -> Digest:
        if dist.get_rank() == 1 and what == "signal":
            raise Stopped("stopped before the first step (SIGTERM)")
        if dist.get_rank() == 1 and what == "memory":
            return Digest(own(path).bytes, "0" * 64)
        return own(path)

    files.digest = digest
    said: list[str] = []
    try:
        found = Store(folder).newest_valid(said.append, Ranks(dist.group.WORLD))
    except Exception as error:
        return f"{type(error).__name__}: {error}", said
    return str(found and found.step), said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2):
        stores.save(tmp_path, step, seed=step)
    return tmp_path


def test_what_is_broken_for_all_is_passed_over(folder: Path) -> None:
    newest = Store(folder).checkpoints()[-1]
    (newest.path / "__0_0.distcp").write_bytes(b"")
    (first, said), *others = world.run(3, verify, folder, "nothing")
    assert first == "1" and others == [("1", [])] * 2
    assert len(said) == 1 and "step 2 is broken, trying step 1" in said[0]


def test_what_one_node_alone_finds_broken_is_that_nodes_fault(folder: Path) -> None:
    results = world.run(2, verify, folder, "memory")
    for text, said in results:
        assert text.startswith("CheckpointError: ") and "is whole on " in text and not said
        assert "see to the file system and the memory of " in text


def test_a_signal_is_no_damage(folder: Path) -> None:
    (first, said), (second, _) = world.run(2, verify, folder, "signal")
    assert second.startswith("Stopped: ")
    # for who watches over the ranks: it knows which of them has gone
    assert first.startswith("RuntimeError: ") and not said

"""A save that fails on one rank fails on all, says why, and leaves what was there."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import world
from checkpoint import stores

from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import CheckpointError, Store

MB = 1 << 20


def _join() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def _row(seed: int, size: int) -> Piece:
    """This rank's row, of `size` bytes, of a tensor with a row a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = torch.full((1, size // 8), 100 * seed + rank)
    return Piece("rows", (ranks, size // 8), (rank, 0), data)


def _save(store: Store, step: int, size: int = 8000) -> None:
    store.write(step, [_row(step, size)], {"step": step}, dist.group.WORLD)


def _fails(store: Store, step: int, size: int = 8000) -> str:
    """The error of a save, which must be the same on every rank; empty: there was none."""
    said = ""
    try:
        _save(store, step, size)
    except CheckpointError as error:
        said = str(error)
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    assert len(set(everywhere)) == 1
    return said


def _finds(store: Store, step: int) -> None:
    """The newest is of that step and whole, and there is nothing half written."""
    found = store.newest_valid(pytest.fail)
    assert found is not None and found.step == step and found.state == {"step": step}
    row = _row(step, 8 * found.tensors()["rows"].shape[1])
    read = Piece(row.name, row.shape, row.offsets, torch.zeros_like(row.data))
    found.read([read])
    assert torch.equal(read.data, row.data)
    assert not list(store.folder.glob("*.partial"))
    dist.barrier()


class _Breaks:
    """Fails, on one rank, the file operation of that number."""

    def __init__(self, number: int, rank: int) -> None:
        self.left = number if rank == dist.get_rank() else -1

    def __call__(self, operation: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "Input/output error", operation)


def _every_operation_fails(folder: Path) -> list[int]:
    """On one rank after the other; returns how many operations each has."""
    _join()
    os.fsync = lambda file: None  # hundreds of saves; what is tested does not depend on it
    counts = []
    for rank in range(dist.get_world_size()):
        for number in itertools.count(1):
            store = Store(folder / f"runs-{rank}-{number}")
            _save(store, 1)
            files.on_operation = _Breaks(number, rank)
            said = _fails(store, 2)
            files.on_operation = files._nothing
            if not said:
                break
            who = re.escape(f"rank {rank} on {socket.gethostname()}")
            assert re.match(
                rf"checkpoint of step 2 was not written: {who}: Input/output error \(.+\)$", said
            )
            # the operation itself was done before it failed; after the rename the new one is there
            done = re.search(r"rename step-00000002\.partial|sync runs|LATEST", said)
            _finds(store, 2 if done else 1)
            _save(store, 2)
            _finds(store, 2)
        counts.append(number - 1)
    return counts


def test_an_operation_that_fails_on_one_rank(tmp_path: Path) -> None:
    counts, *others = world.run(3, _every_operation_fails, tmp_path)
    assert others == [counts, counts]
    assert counts[0] > 20 and counts[1] == counts[2] >= 3


def _mistakes(folder: Path) -> None:
    _join()
    rank, store = dist.get_rank(), Store(folder)
    other = Piece("rows", (2, 99), (rank, 0), torch.zeros(1, 99))
    what = r"rows is both torch\.int64 \(2, 100\) and torch\.float32 \(2, 99\)"
    with pytest.raises(CheckpointError, match=what):
        store.write(1, [other if rank else _row(1, 800)], {}, dist.group.WORLD)
    with pytest.raises(CheckpointError, match=r"rank 0 on \S+: TypeError: .* not JSON serializ"):
        store.write(1, [_row(1, 800)], {"a": object()}, dist.group.WORLD)
    assert not folder.exists()


def test_mistakes_of_one_rank(tmp_path: Path) -> None:
    world.run(2, _mistakes, tmp_path / "store")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def _disk_too_small(folder: Path) -> tuple[str, str]:
    """Saves that do not fit: one known before, one noticed while writing."""
    _join()
    store, filler = Store(folder), folder / "filler"
    _save(store, 1)
    known = _fails(store, 2, 3 * MB)
    _finds(store, 1)

    def fill(operation: str) -> None:
        if operation == "mkdir step-00000003.partial":
            filler.write_bytes(bytes(6 * MB))

    files.on_operation = fill
    noticed = _fails(store, 3, MB)
    files.on_operation = files._nothing
    _finds(store, 1)
    if dist.get_rank() == 0:
        filler.unlink()
    _save(store, 3, MB)
    _finds(store, 3)
    return known, noticed


@pytest.mark.root
def test_full_disk(disk: Path) -> None:
    (known, noticed), *_ = world.run(3, _disk_too_small, disk)
    start = r"checkpoint of step {} was not written: rank \d on \S+( and \d more)?: "
    end = r"No space left on device \({}\S*\): {} MB free, about {} MB needed$"
    assert re.match(start.format(2) + end.format(disk, r"8\.\d+", r"9\.\d+"), known), known
    data = f"{disk}/step-00000003.partial/__"
    assert re.match(start.format(3) + end.format(data, r"2\.\d+", r"3\.1\d"), noticed), noticed


@pytest.mark.root
def test_full_disk_of_a_process_alone(disk: Path) -> None:
    stores.save(disk, 1, seed=1)
    (disk / "filler").write_bytes(bytes(8 * MB - 64 * 1024))
    what = r"step 2 was not written: No space left on device \(.*\): \S+ kB free, about 26\d kB ne"
    with pytest.raises(CheckpointError, match=what):
        Store(disk).write(2, [Piece("a", (1 << 16,), (0,), torch.zeros(1 << 16))], {}, None)
    found = Store(disk).newest_valid(pytest.fail)
    assert found is not None and stores.holds(found, 1)


def _disk_read_only(folder: Path) -> str:
    _join()
    store = Store(folder)
    _save(store, 1)
    _save(store, 2)
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    said = _fails(store, 3)
    _finds(store, 2)
    with pytest.raises(CheckpointError, match="checkpoints were not deleted: Read-only file sys"):
        store.prune(1, None)
    _finds(store, 2)
    return said


@pytest.mark.root
def test_read_only_disk(disk: Path) -> None:
    said, _ = world.run(2, _disk_read_only, disk)
    assert f"Read-only file system ({disk}/step-00000003.partial)" in said


def _not_shared(folder: Path) -> str:
    """Rank 1 has another disk under the same name, as a node would without a shared one."""
    _join()
    store = Store(folder)
    _save(store, 1)
    if dist.get_rank() == 1:
        new_namespace = 0x20000  # CLONE_NEWNS: mounts of this process are its own
        assert ctypes.CDLL(None, use_errno=True).unshare(new_namespace) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    said = _fails(store, 2)
    if dist.get_rank() == 0:
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [1]
    return said


@pytest.mark.root
def test_folder_that_nodes_do_not_share(tmp_path: Path) -> None:
    said, _ = world.run(2, _not_shared, tmp_path)
    assert re.search(r"rank 1 on \S+: .*partial, which the first rank made, is not there", said)
    assert said.endswith("it must be on a file system that all nodes share")


def _dies(rank: int, victim: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=60),
    )
    store = Store(folder)
    _save(store, 1)

    def die(operation: str) -> None:
        if operation == f"write __{victim}_0.distcp":
            os.kill(os.getpid(), signal.SIGKILL)

    files.on_operation = die
    try:
        _save(store, 2)
    except CheckpointError as error:
        (folder / f"said-{rank}").write_text(str(error))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_does_not_hang_the_others(tmp_path: Path, victim: int) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_dies, args=(rank, victim, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(50)  # less than the group's timeout
    left = [process for process in ranks if process.is_alive()]
    for process in left:
        process.kill()
    assert not left and ranks[victim].exitcode == -signal.SIGKILL
    said = {path.name: path.read_text() for path in tmp_path.glob("said-*")}
    assert set(said) == {f"said-{rank}" for rank in range(3) if rank != victim}
    assert all("lost touch with another rank" in text for text in said.values())
    assert [checkpoint.step for checkpoint in Store(tmp_path).checkpoints()] == [1]
    Store(tmp_path).checkpoints()[0].verify()
    assert victim == 0 or not list(tmp_path.glob("*.partial"))

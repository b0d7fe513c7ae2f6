"""What a drive may do to the state of a level is named, and nothing wrong is used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.plain_ops import PlainAsyncIo

from nlscale.errors import TrainingFailed, UserError
from nlscale.levels.nvme import Drive, NvmeTier
from nlscale.levels.ring import Ring
from nlscale.levels.slots import HEADER, Slot
from nlscale.levels.spectrum import SyncGroup
from nlscale.ops import compiled

PERIOD, SIZE = 4, 3001


@pytest.fixture(autouse=True)
def operation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "load", lambda name: PlainAsyncIo)
    monkeypatch.setattr(PlainAsyncIo, "done", {})
    yield
    PlainAsyncIo.fault = staticmethod(lambda kind, number, path: None)


def inner(phase: int) -> Any:
    """AdamW of one shard, as megatron-core's optimizer has it."""
    drawn = torch.Generator().manual_seed(phase)
    weights = torch.nn.Parameter(torch.randn(SIZE, generator=drawn))
    own = torch.optim.AdamW([weights], lr=1e-2, fused=True)
    own.found_inf = torch.zeros(())
    return own


def gradient(phase: int, step: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * step + phase))


class Group:
    """A sync group on a drive."""

    def __init__(self, drive: Drive, phase: int) -> None:
        own = inner(phase)
        (self.shard,) = own.param_groups[0]["params"]
        self.place = torch.zeros(SIZE)
        group, kept = SyncGroup(1, phase, PERIOD), ("exp_avg", "exp_avg_sq")
        counted, places = {self.shard: True}, {self.shard: self.place}
        self.tier = NvmeTier(drive.ring, group, own, kept, places, counted, drive=drive)

    def step(self, step: int) -> None:
        self.tier.gradients[self.shard] = gradient(self.tier.group.phase, step)
        self.tier.step()


def on_drive(folder: Path, phases: int) -> list[Group]:
    drive = Drive(folder, 2, Ring(2**16, torch.device("cpu")))
    return [Group(drive, phase) for phase in range(phases)]


def in_memory(phase: int, steps: list[int]) -> torch.Tensor:
    """Weights after updates of state that lies where it is."""
    own = inner(phase)
    (weights,) = own.param_groups[0]["params"]
    for step in steps:
        weights.grad = gradient(phase, step)
        own.step()
    return weights.detach()


def wait_until(over: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not over():
        assert time.monotonic() < ends
        time.sleep(0.001)


def wait(group: Group) -> None:
    """Until the write-back of a group has ended."""
    writing = group.tier.writing
    wait_until(lambda: writing is None or writing.done())


def test_what_is_due_has_been_asked_for_before(tmp_path: Path) -> None:
    """With a group for each step, and once in an order that nobody expects."""
    groups, asked = on_drive(tmp_path, PERIOD), []
    PlainAsyncIo.fault = staticmethod(lambda kind, number, path: asked.append((kind, path)))
    for step in range(1, 14):
        due = groups[step % PERIOD]
        for group in groups:
            group.tier.read_ahead(step)
        slot = due.tier.slot.path
        updates = sum(earlier % PERIOD == step % PERIOD for earlier in range(1, step))
        wait_until(partial(lambda path, n: asked.count(("read", path)) == n, slot, updates + 1))
        due.step(step)
        wait(due)
    assert [kind for kind, _ in asked].count("read") <= 13 + 2  # nothing is read for nothing
    groups[3].step(14)  # of phase 2
    for phase, group in enumerate(groups):
        group.tier.settle()
        steps = [step for step in range(1, 14) if step % PERIOD == phase] + [14] * (phase == 3)
        assert torch.equal(group.shard.detach(), in_memory(phase, steps))
        assert torch.equal(group.place, group.shard.detach())
    assert not [*tmp_path.iterdir()]


def flips(slot: Slot) -> None:
    with open(slot.path, "r+b") as file:
        file.seek(HEADER + 4 * SIZE + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cuts(slot: Slot) -> None:
    os.truncate(slot.path, slot.size - 4096)


def loses(share: float) -> Any:
    return lambda slot: share


FAULTS = {
    "flipped": (flips, "checksum is"),
    "short": (cuts, r"the file has [\d,]+ of [\d,]+ bytes"),
    "lost": (loses(0.0), "holds version 1, and 2 was written"),
    "half": (loses(0.5), "checksum is"),
    "refused": (loses(-1), "cannot be written"),
}


@pytest.mark.parametrize("reader", ["step", "settle", "read_ahead"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_what_was_written_is_named_and_not_used(
    tmp_path: Path, fault: str, reader: str
) -> None:
    damage, said = FAULTS[fault]
    (group,) = on_drive(tmp_path, 1)
    slot, in_writing = group.tier.slot, fault in ("lost", "half", "refused")
    if in_writing:
        PlainAsyncIo.fault = staticmethod(
            lambda kind, number, path: damage(slot) if kind == "write" else None
        )
    group.step(4)
    wait(group)
    if not in_writing:
        damage(slot)
    place = group.place.clone()
    with pytest.raises(TrainingFailed, match=f"level 1, phase 0, in tiers.folder.*{said}"):
        if reader == "settle":
            group.tier.settle()
        if reader == "read_ahead":
            group.tier.read_ahead(8)
        group.step(8)
    assert torch.equal(group.place, place)


def test_what_others_write_is_what_the_next_update_begins_with(tmp_path: Path) -> None:
    """As a checkpoint that is read; what was read ahead meanwhile is old."""
    (group,) = on_drive(tmp_path, 1)
    group.step(4)
    wait(group)
    group.tier.read_ahead(5)
    with torch.no_grad():
        group.shard.zero_()
        for kept in group.tier.inner.state[group.shard].values():
            kept.zero_()
    group.tier.written()
    group.step(8)
    group.tier.settle()
    meant = torch.nn.Parameter(torch.zeros(SIZE))
    meant.grad = gradient(0, 8)
    torch.optim.AdamW([meant], lr=1e-2, fused=True).step()
    assert torch.equal(group.shard.detach(), meant.detach())


def test_a_folder_without_room_or_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, begin: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match="cannot be written: No such file"):
        Slot(tmp_path / "none", 10, 1, "a slot")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for 8,192 bytes of this rank's state; free some"):
        Slot(tmp_path, 10, 1, "a slot")
    assert not [*tmp_path.iterdir()]

"""State of sync groups on a drive: read ahead before a group is due, and written back behind it.

A group is updated as one in host memory is (`nlscale.levels.host_tier`), from one of two buffers as
large as the largest slot of the rank. While one group is updated or on its way back, the next one
comes in to the other. Two threads wait for the drive, compute checksums and compare them; reading
and writing itself is DeepSpeed's asynchronous I/O, past the page cache. Which group is next follows
from the periods; where that is not the one that is updated, it is read then, and waited for.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlscale.errors import UserError
from nlscale.levels.host_tier import HostTier
from nlscale.levels.ring import Ring, pin
from nlscale.levels.slots import HEADER, Slot
from nlscale.ops import compiled

_BLOCK, _QUEUED = 2**20, 32
"""Bytes of a request of DeepSpeed's, and how many a thread has under way **[choice]**."""
_PAGE = 4096


@dataclass
class _Buffer:
    """Room for a slot."""

    memory: Tensor
    """uint8, page-locked."""
    holds: NvmeTier | None = None
    """Whose slot is, or will be, here."""
    read: Future[None] | None = None
    """What is over when it is here, compared; None: it has been updated."""


class Drive:
    """The folder of a rank's slots, and what comes and goes.

    Args:
        folder: on a drive of the node.
        threads: of DeepSpeed's that read, and as many that write.
        ring: of this rank.

    Raises:
        UserError: DeepSpeed's operation is not compiled.
    """

    def __init__(self, folder: Path, threads: int, ring: Ring) -> None:
        self.folder, self.threads, self.ring = folder, threads, ring
        handle = compiled.load("async_io").aio_handle
        self._incoming, self._outgoing = (
            handle(_BLOCK, _QUEUED, False, True, threads) for _ in range(2)
        )
        self._reader, self._writer = (ThreadPoolExecutor(1) for _ in range(2))
        self._tiers: list[NvmeTier] = []
        self._made: list[_Buffer] = []
        self._step = 0
        self.read_bytes = self.written_bytes = 0
        """So far."""

    def add(self, tier: NvmeTier) -> None:
        """One more; before the first step."""
        self._tiers.append(tier)

    def _buffers(self) -> list[_Buffer]:
        """Both; made when first asked for, as all slots are known then."""
        if not self._made:
            size = max(tier.slot.size for tier in self._tiers)
            self._made = [_Buffer(memory) for memory in self._allocate(size)]
        return self._made

    def _allocate(self, size: int) -> Iterator[Tensor]:
        """Two page-locked pieces of memory, uint8 [size], which begin at a page."""
        if self.ring.device.type == "cuda":
            for _ in range(2):
                room = torch.empty(size + _PAGE, dtype=torch.uint8)
                begin = -room.data_ptr() % _PAGE
                memory = room[begin : begin + size]
                pin(self, memory)
                yield memory
            return
        most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if os.geteuid() != 0 and most != resource.RLIM_INFINITY and most < 2 * size:
            raise UserError(
                f"memory=nvme locks {2 * size:,} bytes of memory, and this process may lock "
                f"{most:,}; raise the limit (ulimit -l)"
            )
        for _ in range(2):
            yield self._incoming.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))

    def read_ahead(self, step: int) -> None:
        """Begin to read what is due next, as far as buffers are free.

        Args:
            step: that is about to be taken, counted from 1.

        Raises:
            TrainingFailed: something could not be written.
        """
        if step == self._step:
            return
        self._step = step
        for tier in self._tiers:
            if tier.writing is not None and tier.writing.done():
                tier.writing.result()
        soonest = sorted(self._tiers, key=lambda tier: tier.group.closes_after(step))
        free = [buffer for buffer in self._buffers() if buffer.holds is None]
        for tier, buffer in zip([t for t in soonest if self._of(t) is None], free, strict=False):
            self._begin(tier, buffer)

    def take(self, tier: NvmeTier) -> Tensor:
        """The buffer that holds the slot of a group, uint8; what is there may be changed.

        Raises:
            TrainingFailed: what came back is not what was written, or nothing did.
        """
        buffer = self._of(tier)
        if buffer is not None and buffer.read is None:  # on its way back
            assert tier.writing is not None
            tier.writing.result()
            buffer = None
        if buffer is None:
            buffer = self._make_free()
            self._begin(tier, buffer)
        assert buffer.read is not None
        buffer.read.result()
        buffer.read = None
        return buffer.memory

    def give_back(self, tier: NvmeTier, event: Any) -> None:
        """Write a slot that `take` has returned.

        Args:
            tier: whose it is.
            event: what is over when it is in the buffer; None: it is.
        """
        buffer = self._of(tier)
        assert buffer is not None
        tier.writing = self._writer.submit(self._write, tier, buffer, event)

    def forget(self, tier: NvmeTier) -> None:
        """Others have written to the slot: what was read ahead of it is old."""
        buffer = self._of(tier)
        if buffer is not None and buffer.read is not None:
            buffer.read.exception()
            buffer.holds = buffer.read = None

    def _of(self, tier: NvmeTier) -> _Buffer | None:
        """Where a slot is that was read, or is being read, or updated."""
        return next((b for b in self._made if b.holds is tier), None)

    def _make_free(self) -> _Buffer:
        """A buffer for a slot that was not expected: one that is free, or is so first."""
        for buffer in self._buffers():
            if buffer.read is None:
                holds = buffer.holds
                if holds is not None and holds.writing is not None:  # on its way back
                    holds.writing.result()
                return buffer
        held = [(b, b.holds) for b in self._buffers() if b.holds is not None]
        buffer, last = max(held, key=lambda both: both[1].group.closes_after(self._step))
        self.forget(last)
        return buffer

    def _begin(self, tier: NvmeTier, buffer: _Buffer) -> None:
        if tier.slot.dirty:
            tier.slot.seal()
        buffer.holds = tier
        buffer.read = self._reader.submit(self._read, tier, buffer)

    def _read(self, tier: NvmeTier, buffer: _Buffer) -> None:
        if tier.writing is not None:
            tier.writing.result()
        slot = tier.slot
        slot.check_size()  # DeepSpeed ends the process where a file is shorter
        memory = buffer.memory[: slot.size]
        if self._incoming.sync_pread(memory, slot.path, 0) != 1:
            raise slot.failed("it cannot be read")
        slot.compare(memory)
        self.read_bytes += slot.size

    def _write(self, tier: NvmeTier, buffer: _Buffer, event: Any) -> None:
        slot = tier.slot
        try:
            if event is not None:
                event.synchronize()
            memory = buffer.memory[: slot.size]
            slot.stamp(memory)
            if self._outgoing.sync_pwrite(memory, slot.path, 0) != 1:
                raise slot.failed("it cannot be written")
            self.written_bytes += slot.size
        finally:
            buffer.holds = None


@dataclass
class NvmeTier(HostTier):
    """The state of a sync group on this rank, on a drive of its node."""

    drive: Drive = field(kw_only=True)
    slot: Slot = field(init=False)
    writing: Future[None] | None = field(default=None, init=False)
    """What is over when the last update is on the drive."""

    def _allocate(self, elements: int) -> Tensor:
        what = f"the state of level {self.group.level}, phase {self.group.phase},"
        self.slot = Slot(self.drive.folder, elements, self.drive.threads, what)
        self.drive.add(self)
        return self.slot.values

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients, and bring the weights into their places."""
        buffer = self.drive.take(self)
        self._step_in(buffer[HEADER : HEADER + self.slot.payload].view(torch.float32))
        self.drive.give_back(self, self._leaving)

    def read_ahead(self, step: int) -> None:
        self.drive.read_ahead(step)

    def settle(self) -> None:
        if self.writing is not None:
            self.writing.result()
        self.slot.settle()

    def written(self) -> None:
        self.drive.forget(self)
        self.slot.dirty = True

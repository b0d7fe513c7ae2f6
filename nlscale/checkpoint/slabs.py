"""The copy of the state in host memory that a save writes from, while training goes on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nlscale.checkpoint.flat import Flat

_SLAB = 1 << 28
"""Bytes; a power of two, to which torch rounds up what it pins."""
_ALIGNED = 16
"""Bytes at whose multiples a range begins: of every dtype a whole number."""


class HostSlabs:
    """Host memory that one copy after another goes to; on machines with GPUs it is pinned.

    Pinned memory is what a GPU writes to by itself, so that all the copies are asked for at once
    and waited for once. It is kept, as getting it takes longer than copying to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slabs: list[Tensor] = []

    def copy(self, flats: list[Flat]) -> list[Flat]:
        """The same ranges, in host memory, some cut in two; they hold until the next call."""
        copies, slab, used = [], 0, 0
        for flat in flats:
            done, count, size = 0, flat.data.numel(), flat.data.element_size()
            while done < count:
                if used == _SLAB:
                    slab, used = slab + 1, 0
                taken = min(count - done, (_SLAB - used) // size)
                part = flat.part(done, done + taken)
                where = self._slab(slab)[used : used + taken * size].view(flat.data.dtype)
                where.copy_(part.data, non_blocking=True)
                copies.append(replace(part, data=where))
                done += taken
                used = min(_SLAB, -(-(used + taken * size) // _ALIGNED) * _ALIGNED)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def _slab(self, number: int) -> Tensor:
        if number == len(self._slabs):
            pinned = self._device.type == "cuda"
            self._slabs.append(torch.empty(_SLAB, dtype=torch.uint8, pin_memory=pinned))
        return self._slabs[number]

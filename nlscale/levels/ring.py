"""State of a sync group in host memory, streamed through the device when the group is due.

Between two updates of a slow level its fp32 weights and what its rule keeps of them are of no use
to the device (docs/concepts/tiers.md). With `memory: host` they lie in host memory, pinned where
there is a GPU, and an update takes them piece by piece: copied into a slot of the ring, updated
there by the level's own rule, copied back. Rules over ranges go element by element, so that the
bits are those of an update of the whole.

On a GPU copies run on two streams of their own, one in each direction: while one piece is updated
the next one comes in and the one before goes out. On a CPU the ring is host memory, too, and all is
done when it is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlscale.levels.ring_pieces import RING_SLOTS

_FP32 = 4


@dataclass
class _Slot:
    """Room for a piece, and what is to be waited for before it is used."""

    memory: Tensor
    arrived: Any = None
    """torch.cuda.Event: what was copied in is there."""
    updated: Any = None
    """Likewise: it may be copied out."""
    left: Any = None
    """Likewise: it has been copied out, and the slot is free."""


class Passage:
    """What an update of state that lies elsewhere passes through; groups of a rank share one.

    Args:
        size: bytes of it.
        device: of the model.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.streamed = 0
        """Bytes that have been copied to the device and from it, together, so far."""

    @property
    def nbytes(self) -> int:
        """Of it on the device."""
        return 0


class Ring(Passage):
    """Device memory through which state is streamed.

    Args:
        size: bytes of it.
        device: where it is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, device)
        each = size // RING_SLOTS // _FP32
        self._memory = torch.empty(RING_SLOTS, each, device=device)
        self._slots = [_Slot(memory) for memory in self._memory]
        self._next = 0
        self._streams = _Streams(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def run(
        self,
        pieces: Sequence[list[Tensor]],
        update: Callable[[int, list[Tensor]], None],
        after: Any = None,
    ) -> Any:
        """Bring pieces in, update each, and bring it back to where it came from.

        Args:
            pieces: of each the host tensors [length], fp32.
            update: called with the number of a piece and its tensors on the device, which it
                changes in place.
            after: what an earlier call returned, whose pieces these are.

        Returns:
            What is over when all of it has come back to the host; None: it has.
        """
        streams, coming = self._streams, list[tuple[_Slot, list[Tensor]]]()
        if streams is not None and after is not None:
            streams.incoming.wait_event(after)
        for number in range(len(pieces) + 1):
            if number < len(pieces):
                coming.append(self._bring_in(pieces[number]))
            if number == 0:
                continue
            slot, tensors = coming.pop(0)
            if streams is not None:
                torch.cuda.current_stream().wait_event(slot.arrived)
            update(number - 1, tensors)
            self._bring_back(slot, tensors, pieces[number - 1])
        return None if streams is None else streams.outgoing.record_event()

    def _bring_in(self, piece: list[Tensor]) -> tuple[_Slot, list[Tensor]]:
        slot, streams = self._slots[self._next], self._streams
        self._next = (self._next + 1) % RING_SLOTS
        tensors, at = [], 0
        with _on(streams and streams.incoming):
            if streams is not None and slot.left is not None:
                streams.incoming.wait_event(slot.left)
            for held in piece:
                there = slot.memory[at : at + held.numel()]
                at += held.numel()
                tensors.append(there.copy_(held, non_blocking=True))
                self.streamed += held.nbytes
            slot.arrived = streams and streams.incoming.record_event()
        return slot, tensors

    def _bring_back(self, slot: _Slot, tensors: list[Tensor], piece: list[Tensor]) -> None:
        streams = self._streams
        if streams is not None:
            slot.updated = torch.cuda.current_stream().record_event()
            streams.outgoing.wait_event(slot.updated)
        with _on(streams and streams.outgoing):
            for held, there in zip(piece, tensors, strict=True):
                held.copy_(there, non_blocking=True)
                self.streamed += held.nbytes
            slot.left = streams and streams.outgoing.record_event()


class _Streams:
    """Of the copies in each direction."""

    def __init__(self, device: torch.device) -> None:
        self.incoming, self.outgoing = (torch.cuda.Stream(device) for _ in range(2))


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)  # type: ignore[no-any-return]


def pin(owner: object, memory: Tensor) -> None:
    """Pin host memory as it is while its owner lives: what torch pins by itself it rounds up to a
    power of two."""
    if not memory.numel():
        return
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    release = weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    release.atexit = False  # the process gives it back, and CUDA may be gone by then

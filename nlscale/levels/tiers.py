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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlscale.config.vocabulary import Config
from nlscale.errors import TrainingFailed
from nlscale.levels.ring_pieces import RING_SLOTS, on_host, piece_elements, ring_bytes
from nlscale.levels.spectrum import SyncGroup

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


class Ring:
    """Device memory through which state is streamed; all groups of a rank share one.

    Args:
        size: bytes of it.
        device: where it is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.streamed = 0
        """Bytes that have been copied in and out, together, so far."""
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


@dataclass(frozen=True)
class _Piece:
    """A range of a shard."""

    shard: Any
    low: int
    high: int


@dataclass
class HostTier:
    """The state of a sync group on this rank, in host memory.

    The shards that the inner optimizer and checkpoints know stay the same objects; their values,
    and what is kept of them, are there from now on.

    Args:
        inner: the rule's optimizer, whose shards are still on the device.
        kept: names of what it keeps of each shard.
        ring: of this rank.
        places: of each shard where its updated weights go, in the model's dtype.
        counted: of each shard whether it is in norms on this rank.
    """

    inner: Any
    kept: tuple[str, ...]
    ring: Ring
    places: dict[Any, Tensor]
    counted: dict[Any, bool]
    gradients: dict[Any, Tensor] = field(default_factory=dict)
    """Of each shard, on the device, which an fp32 tensor on the host cannot have as its `grad`."""
    measures: bool = False
    """Whether the next update is measured."""
    moved: Tensor = field(init=False)
    """Of the last that was: sums of squares of the update and of the weights before it, fp32 [2],
    as far as norms count them on this rank."""
    _leaving: Any = None
    """What is over when the last update has come back."""

    def __post_init__(self) -> None:
        self._groups = {p: group for group in self.inner.param_groups for p in group["params"]}
        sizes = [p.numel() for p in self._groups]
        values, device = 1 + len(self.kept), self.ring.device
        self._memory = torch.zeros(sum(sizes) * values)
        if device.type == "cuda":
            _pin(self, self._memory)
        at, length = 0, piece_elements(self.ring.size, len(self.kept))
        self._pieces: list[_Piece] = []
        for p, size in zip(self._groups, sizes, strict=True):
            rows = self._memory[at : at + values * size].view(values, size)
            at += values * size
            rows[0].copy_(p.detach())
            p.data = rows[0]
            state = {name: rows[1 + i] for i, name in enumerate(self.kept)}
            self.inner.state[p] = {"step": torch.zeros((), device=device), **state}
            ends = range(0, size, length)
            self._pieces += [_Piece(p, low, min(low + length, size)) for low in ends]

    @property
    def nbytes(self) -> int:
        """On the host."""
        return self._memory.nbytes

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients, and bring the weights into their places."""
        measures, self.measures = self.measures, False
        moved: list[Tensor] = []
        steps = {p: self.inner.state[p]["step"].clone() for p in self._groups}

        def update(number: int, tensors: list[Tensor]) -> None:
            piece, weights = self._pieces[number], tensors[0]
            p, part = piece.shard, slice(piece.low, piece.high)
            before = weights.clone() if measures and self.counted[p] else None
            weights.grad = self.gradients[p][part]
            self._step_one(p, tensors, steps[p])
            self.places[p][part].copy_(weights)
            if before is not None:
                old = torch.linalg.vector_norm(before)
                moved.append(torch.stack([torch.linalg.vector_norm(before.sub_(weights)), old]))
            weights.grad = None

        pieces = [self._tensors(piece) for piece in self._pieces]
        self._leaving = self.ring.run(pieces, update, self._leaving)
        if measures:
            zeros = torch.zeros(2, device=self.ring.device)
            self.moved = torch.stack(moved).square().sum(0) if moved else zeros

    def settle(self) -> None:
        """Wait until what the last update has changed is on the host, for who reads it there."""
        if self._leaving is not None:
            self._leaving.synchronize()

    def _tensors(self, piece: _Piece) -> list[Tensor]:
        """Of a piece, on the host."""
        state, part = self.inner.state[piece.shard], slice(piece.low, piece.high)
        return [piece.shard.data[part], *(state[name][part] for name in self.kept)]

    def _step_one(self, shard: Any, tensors: list[Tensor], step: Tensor) -> None:
        """Let the rule update a piece alone, as if it were a shard that it has always had."""
        inner, (weights, *kept) = self.inner, tensors
        given = {"step": step.clone(), **dict(zip(self.kept, kept, strict=True))}
        inner.state[weights] = given
        groups = inner.param_groups
        inner.param_groups = [{**self._groups[shard], "params": [weights]}]
        try:
            inner.step()
        finally:
            inner.param_groups = groups
            left = inner.state.pop(weights)
        if left.keys() != {"step", *self.kept}:
            raise TrainingFailed(
                f"{type(inner).__name__} keeps {', '.join(sorted(left))} of each parameter, and "
                f"its rule says step, {', '.join(self.kept)}: Rule.state has to name them"
            )
        for name, there in zip(self.kept, kept, strict=True):
            if left[name] is not there:
                there.copy_(left[name])
        inner.state[shard]["step"].copy_(left["step"])


def _pin(owner: object, memory: Tensor) -> None:
    """Pin host memory as it is while its owner lives: what torch pins by itself it rounds up to a
    power of two."""
    if not memory.numel():
        return
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    release = weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    release.atexit = False  # the process gives it back, and CUDA may be gone by then


def rings_of_levels(
    config: Config, groups: Iterable[SyncGroup], device: torch.device
) -> list[Ring | None]:
    """Of each level the ring of this rank, the same one, if its state lies in host memory.

    Args:
        config: of the run.
        groups: of which this rank holds a part.
        device: of the model.
    """
    host = on_host(config)
    if not any(host[group.level] for group in groups):
        return [None] * len(host)
    ring = Ring(ring_bytes(config), device)
    return [ring if own else None for own in host]

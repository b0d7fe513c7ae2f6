"""The state of a sync group in host memory, which an update streams through a ring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlscale.errors import TrainingFailed
from nlscale.levels.ring import Passage, Ring, pin
from nlscale.levels.ring_pieces import piece_elements
from nlscale.levels.spectrum import SyncGroup


@dataclass(frozen=True)
class Piece:
    """A range of a shard."""

    shard: Any
    low: int
    high: int
    at: int
    """Where the shard begins in the memory of its tier."""
    size: int
    """Elements of the shard."""

    @property
    def part(self) -> slice:
        return slice(self.low, self.high)

    def tensors(self, memory: Tensor, values: int) -> list[Tensor]:
        """The weights and what is kept of them, where a tier's memory holds them.

        Args:
            memory: fp32, of the tier; one row after the other of each shard.
            values: rows of a shard.
        """
        begins = [self.at + row * self.size for row in range(values)]
        return [memory[at + self.low : at + self.high] for at in begins]


@dataclass
class HostTier:
    """The state of a sync group on this rank, in host memory.

    The shards that the inner optimizer and checkpoints know stay the same objects; their values,
    and what is kept of them, are there from now on.

    Args:
        ring: of this rank.
        group: whose state it is.
        inner: the rule's optimizer, whose shards are still on the device.
        kept: names of what it keeps of each shard.
        places: of each shard where its updated weights go, in the model's dtype.
        counted: of each shard whether it is in norms on this rank.
    """

    ring: Passage
    group: SyncGroup
    inner: Any
    kept: tuple[str, ...]
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
        device, length = self.ring.device, piece_elements(self.ring.size, len(self.kept))
        self._memory = self._allocate(sum(sizes) * self.values)
        at = 0
        self._pieces: list[Piece] = []
        for p, size in zip(self._groups, sizes, strict=True):
            rows = self._memory[at : at + self.values * size].view(self.values, size)
            rows[0].copy_(p.detach())
            p.data = rows[0]
            state = {name: rows[1 + i] for i, name in enumerate(self.kept)}
            self.inner.state[p] = {"step": torch.zeros((), device=device), **state}
            ends = range(0, size, length)
            self._pieces += [Piece(p, low, min(low + length, size), at, size) for low in ends]
            at += self.values * size

    def _allocate(self, elements: int) -> Tensor:
        """Memory for the state, fp32 zeros [elements]."""
        memory = torch.zeros(elements)
        if self.ring.device.type == "cuda":
            pin(self, memory)
        return memory

    @property
    def values(self) -> int:
        """Of each parameter: its weight and what is kept of it."""
        return 1 + len(self.kept)

    @property
    def nbytes(self) -> int:
        """Of the state."""
        return self._memory.nbytes

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients, and bring the weights into their places."""
        self._step_in(self._memory)

    def _step_in(self, memory: Tensor) -> None:
        """The same of the state that lies there, on the host."""
        ring, measures = self.ring, self.measures
        assert isinstance(ring, Ring)
        self.measures = False
        moved: list[Tensor] = []
        steps = {p: self.inner.state[p]["step"].clone() for p in self._groups}

        def update(number: int, tensors: list[Tensor]) -> None:
            piece, weights = self._pieces[number], tensors[0]
            p, part = piece.shard, piece.part
            before = weights.clone() if measures and self.counted[p] else None
            weights.grad = self.gradients[p][part]
            self._step_one(p, tensors, steps[p])
            self.places[p][part].copy_(weights)
            if before is not None:
                old = torch.linalg.vector_norm(before)
                moved.append(torch.stack([torch.linalg.vector_norm(before.sub_(weights)), old]))
            weights.grad = None

        pieces = [piece.tensors(memory, self.values) for piece in self._pieces]
        self._leaving = ring.run(pieces, update, self._leaving)
        if measures:
            zeros = torch.zeros(2, device=ring.device)
            self.moved = torch.stack(moved).square().sum(0) if moved else zeros

    def read_ahead(self, step: int) -> None:
        """Begin with what the next updates need; before a step, counted from 1."""

    def settle(self) -> None:
        """Wait until what the last update has changed is on the host, for who reads it there."""
        if self._leaving is not None:
            self._leaving.synchronize()

    def written(self) -> None:
        """Others have written to the shards, or to what is kept of them."""

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

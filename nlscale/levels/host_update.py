"""State in host memory that the host updates: gradients come to it, and weights go back.

Of a parameter 4 bytes of gradient go out of the device and the weight in the model's dtype comes
in, piece by piece, through pinned memory; the state does not move (docs/concepts/tiers.md). The
host calls the operation itself, so it has to know whether the step is admitted, and waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlscale.levels.host_tier import HostTier, Piece
from nlscale.levels.ring import Passage, pin
from nlscale.optim.table import OnHost

_STAGED = 2**24
"""Bytes of gradient that are on their way at once, of weights fewer **[choice]**: 0.3 ms of PCIe,
next to which a copy's beginning is little."""


class Staging(Passage):
    """Pinned host memory that gradients come to, and weights go from; none without a GPU.

    Args:
        device: of the model.
        rule: how it updates ranges on the host.
    """

    def __init__(self, device: torch.device, rule: OnHost) -> None:
        super().__init__(_STAGED, device)
        self.rule: Any = rule.make()
        self._came: list[Tensor] = []
        self._goes: list[Tensor] = []
        self._copying: Any = None
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)

    def run(
        self,
        gradients: Sequence[Tensor],
        places: Sequence[Tensor],
        update: Callable[[int, Tensor], Tensor],
    ) -> None:
        """Let each piece be updated on the host by its gradient, and its weights go to their place.

        Args:
            gradients: of each piece [length], fp32, on the device.
            places: of each where its weights go there, in the model's dtype.
            update: called with the number of a piece and its gradient, both on the host; returns
                its weights there, fp32.
        """
        self.streamed += sum(g.nbytes + p.nbytes for g, p in zip(gradients, places, strict=True))
        if self._copying is None:
            for number, place in enumerate(places):
                place.copy_(update(number, gradients[number]))
            return
        self._room(gradients, places)
        now, left = torch.cuda.current_stream(), [torch.cuda.Event(), torch.cuda.Event()]
        self._copying.wait_stream(now)
        arrived: list[Any] = []
        for number in range(len(places) + 1):
            if number < len(places):
                with torch.cuda.stream(self._copying):
                    there = self._came[number % 2][: gradients[number].numel()]
                    there.copy_(gradients[number], non_blocking=True)
                    arrived.append(self._copying.record_event())
            if number == 0:
                continue
            last = number - 1
            arrived[last].synchronize()
            weights = update(last, self._came[last % 2][: places[last].numel()])
            left[last % 2].synchronize()
            goes = self._goes[last % 2][: weights.numel()].copy_(weights)
            places[last].copy_(goes, non_blocking=True)
            left[last % 2].record(now)
        for event in left:
            event.synchronize()

    def _room(self, gradients: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        if self._came or not places:
            return
        for own, like in ((self._came, gradients[0]), (self._goes, places[0])):
            memory = torch.empty(2, _STAGED // 4, dtype=like.dtype)
            pin(self, memory)
            own.extend(memory)


@dataclass
class UpdatedOnHost(HostTier):
    """State in host memory, updated there."""

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their gradients, and bring the weights into their places."""
        staging, measures = self.ring, self.measures
        assert isinstance(staging, Staging)
        self.measures, moved = False, torch.zeros(2)
        held = bool(self.inner.found_inf > 0)  # the host waits for the verdict on the step
        states = {p: self.inner.state[p] for p in self._groups}
        counts = [1 + count for count in _values([state["step"] for state in states.values()])]
        count_of = dict(zip(states, counts, strict=True))

        def update(number: int, gradient: Tensor) -> Tensor:
            piece = self._pieces[number]
            weights, *kept = piece.tensors(self._memory, self.values)
            before = weights.clone() if measures and self.counted[piece.shard] else None
            if not held:
                names = dict(zip(self.kept, kept, strict=True))
                group = self._groups[piece.shard]
                staging.rule.update(group, count_of[piece.shard], weights, gradient, names)
            if before is not None:
                moved[1] += torch.linalg.vector_norm(before).square()
                moved[0] += torch.linalg.vector_norm(before.sub_(weights)).square()
            return weights

        staging.run(
            [self._of(piece, self.gradients) for piece in self._pieces],
            [self._of(piece, self.places) for piece in self._pieces],
            update,
        )
        if not held:
            for state in states.values():
                state["step"] += 1
        if measures:
            self.moved = moved.to(staging.device)

    @staticmethod
    def _of(piece: Piece, tensors: dict[Any, Tensor]) -> Tensor:
        return tensors[piece.shard][piece.part]


def _values(scalars: list[Tensor]) -> list[float]:
    """Of scalars on the device, in one copy."""
    return torch.stack(scalars).tolist() if scalars else []

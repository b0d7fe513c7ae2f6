"""What a mixer with a memory carries from one piece of the sequences to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nlscale.model.mixers.state import State, last_inputs
from nlscale.ops.memory.rules import MemoryState


@dataclass
class MixerState(State):
    """The last inputs of the convolution and, as in `MemoryState`, the memory."""

    tail: Tensor
    """[batch, window - 1, channels]."""
    start: Tensor | None
    current: Tensor
    position: Tensor
    main_start: Tensor | None = None
    uncertainty: Tensor | None = None
    momentum: Tensor | None = None
    since: Tensor | None = None

    @classmethod
    def after(
        cls, tail: Tensor, fed: Tensor, lengths: Tensor | None, memory: MemoryState
    ) -> MixerState:
        """The state after a piece.

        Args:
            tail: before it, [window - 1, batch, channels].
            fed: what the convolution was fed with, [sequence, batch, channels].
            lengths: how many of them each row reads, int64 [batch], on the CPU; None: all.
            memory: after it.
        """
        last = last_inputs(tail, fed, lengths)
        return cls(last, **{f.name: getattr(memory, f.name) for f in fields(memory)})

    @property
    def memory(self) -> MemoryState:
        return MemoryState(**{f.name: getattr(self, f.name) for f in fields(MemoryState)})

    def fits(self, mixer: Any, lengths: Tensor) -> bool:
        """Chunks begin where their length divides what a row has read."""
        return torch.equal(self.position, lengths % mixer.rules.chunk)

    def reset(self, rows: Tensor) -> None:
        """Pi begins as I, the gain's uncertainty at 1, and all else as zeros."""
        super().reset(rows)
        if self.uncertainty is not None:
            self.uncertainty[rows.to(self.uncertainty.device)] = 1
        if self.start is None:
            return
        d = self.start.shape[-1]
        for x in (self.start, self.current):
            x[rows.to(x.device), ..., :d, :] = torch.eye(d, dtype=x.dtype, device=x.device)

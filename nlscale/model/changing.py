"""Weights of levels that each sequence changes for itself, by the gradient of what it has read.

First order (docs/concepts/context.md), of each sequence, at the end of a level's chunk, of n
targets:

    g = (sum over these of the gradient of -log p by the weights) / n
    change <- change - eta ( min(1, clip / |g|) g + pull change )

The weights are those of the level's CMS MLPs, up and down, of all its blocks as one; |g| is over
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nlscale.config.in_context import InContext
from nlscale.config.vocabulary import ContextReset
from nlscale.model.decoder import Decoder
from nlscale.ops.by_hand import wide


class LevelChange:
    """What the sequences have changed of one level, and what its open chunk has summed."""

    def __init__(self, decoder: Decoder, of: InContext, batch: int) -> None:
        self.of = of
        self._mlps: list[Any] = [decoder.blocks[str(i)].cms.mlps[of.mlp] for i in of.depths]  # type: ignore[union-attr,index]
        weights = [weight for mlp in self._mlps for weight in (mlp.up.weight, mlp.down.weight)]
        self.changes = [w.new_zeros(batch, *w.shape, dtype=wide(w)) for w in weights]
        self.sums = [torch.zeros_like(change) for change in self.changes]
        self.targets = 0
        """Summed over."""
        self.tokens = 0
        """Of the open chunk."""
        self._dtypes = [weight.dtype for weight in weights]

    def leaves(self) -> list[Tensor]:
        """The changes in the dtypes of the weights, to be differentiated by."""
        found = zip(self.changes, self._dtypes, strict=True)
        return [change.to(dtype).detach().requires_grad_() for change, dtype in found]

    def put(self, leaves: Sequence[Tensor] | None) -> None:
        """Have the MLPs compute with these; None: with their own weights alone."""
        for i, mlp in enumerate(self._mlps):
            mlp.changes = None if leaves is None else (leaves[2 * i], leaves[2 * i + 1])

    def add(self, gradients: Sequence[Tensor], targets: int, tokens: int) -> None:
        """Sum gradients of so many targets of each sequence; change where the chunk is over."""
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient
        self.targets += targets
        self.tokens += tokens
        if self.tokens >= self.of.chunk:
            self._change()

    def forget(self) -> None:
        """Begin anew from the trained weights, unless it never does."""
        if self.of.keys.reset == ContextReset.never:
            return
        for x in (*self.changes, *self.sums):
            x.zero_()
        self.targets = self.tokens = 0

    def _change(self) -> None:
        keys = self.of.keys
        mean = [total / max(1, self.targets) for total in self.sums]
        squares = sum(g.square().sum((1, 2)) for g in mean)
        assert isinstance(squares, Tensor)
        factor = torch.ones_like(squares)
        if keys.clip is not None:
            factor = (keys.clip / squares.sqrt()).clamp(max=1)  # by 0: infinite, and so 1
        for change, total, g in zip(self.changes, self.sums, mean, strict=True):
            change -= keys.learning_rate * (factor[:, None, None] * g + keys.pull * change)
            total.zero_()
        self.targets = self.tokens = 0


@contextmanager
def changing(levels: Sequence[LevelChange]) -> Iterator[list[Tensor]]:
    """Within, the model computes with the changes of the levels; yields what to differentiate by,
    level by level."""
    leaves = [level.leaves() for level in levels]
    try:
        for level, own in zip(levels, leaves, strict=True):
            level.put(own)
        yield [leaf for own in leaves for leaf in own]
    finally:
        for level in levels:
            level.put(None)

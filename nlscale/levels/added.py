"""What hooks of a run add to its updates: terms of the gradient, and levels that stand still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from nlscale.levels.optimizers import GroupOptimizer

Term = Callable[[GroupOptimizer, Tensor], None]
"""Adds to the `grad` of a group's `main_parameters`, which holds the sum over targets of a window,
that of a term of the loss. The tensor is how many targets these are, []: a term that each target
has once is multiplied by it. Weights do not change within a window, so that a term of the weights
alone is what all its steps would have added."""


@dataclass
class Added:
    """To the updates of a run."""

    terms: list[Term] = field(default_factory=list)
    """Before the norm is taken, so that they are clipped with the gradient."""
    frozen: set[int] = field(default_factory=set)
    """Levels whose learning rate is 0. Their windows and moments go on."""

    def to_gradients(self, group: GroupOptimizer, count: Tensor) -> None:
        """Add the terms to the gradient of a group that is due."""
        for term in self.terms:
            term(group, count)

    def factor(self, level: int) -> float:
        """On the learning rate of a level."""
        return 0.0 if level in self.frozen else 1.0

"""The keys of a level's `outer` (docs/concepts/outer.md)."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config.fields import within


@dataclass
class OuterConfig:
    """Outer steps of a level: Nesterov momentum over what several of its updates have made of its
    weights, D: m <- b m + D, and the weights go on from old - rate (D + b m)."""

    every: int | None = within(None, above=0, most=10**9)
    """Updates of the level between two outer steps; null: it makes none."""
    momentum: float = within(0.9, least=0, below=1)
    """b, per outer step."""
    learning_rate: float = within(0.7, above=0)
    """The rate; no schedule changes it. 1, with momentum 0, leaves the weights where the updates
    have brought them."""

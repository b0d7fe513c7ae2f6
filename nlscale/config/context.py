"""The keys of a level's `context`, and which MLPs they are of (docs/concepts/context.md)."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config.choices import ContextObjective, ContextReset
from nlscale.config.fields import MOST, within


@dataclass
class ContextConfig:
    """Changes that a level's MLPs make while a sequence is read, of each sequence its own."""

    chunk: int | None = within(None, above=0, most=MOST)
    """Tokens between two changes; null: the level does not change inside the context."""
    objective: ContextObjective = ContextObjective.local
    """local: a sum of outer products of the MLP's hidden units with a learned target, added to its
    down projection; training learns through it. ntp: the gradient of the next tokens' loss, first
    order; training does not know of it, and what evaluates a trained model does."""
    learning_rate: float = within(1.0, least=0)
    """Of a change. 0: none, to the bit."""
    clip: float | None = within(None, above=0)
    """Of ntp: the largest norm of the gradient of a sequence; null: any."""
    pull: float = within(0.0, least=0)
    """Of ntp: how much of the change is taken back with each, as a factor on learning_rate."""
    decay: float = within(1.0, least=0, most=1)
    """Of local: what is left of earlier changes after each chunk."""
    reset: ContextReset = ContextReset.sequence
    """When ntp begins anew from the trained weights: with each sequence, or never."""
    blocks: int | None = within(None, above=0, most=MOST)
    """How many of the last blocks it is in; null: a quarter of them, at least one."""

    def depths(self, layers: int) -> range:
        """The blocks that it is in, of so many."""
        count = -(-layers // 4) if self.blocks is None else self.blocks
        return range(max(0, layers - count), layers)

"""Where a sync group stands between its updates (no tensors)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nlscale.levels.noise import GradientNoise


@dataclass
class Progress:
    """Where a sync group stands; the same on every rank, also on those that hold none of it."""

    tokens: int = 0
    """Tokens in the window, of the steps admitted since the last update, over all ranks."""
    counted_tokens: int = 0
    """Targets among them that count: its gradient is a mean over these."""
    updates: int = 0
    reductions: int = 0
    """Across nodes; fewer than steps only where they are deferred."""
    short: int = 0
    """Steps by which the periods of its updates were shorter than the longest, together."""
    noise: GradientNoise = field(default_factory=GradientNoise)
    """Of its gradient."""

    @classmethod
    def of_plain(cls, saved: dict[str, Any], noise: dict[str, Any] | None) -> Progress:
        """As a checkpoint has it; of versions that lack some of it, as it was then.

        Without masks every token counted.
        """
        found = {"counted_tokens": saved["tokens"], "short": 0, **saved}
        names = {f.name for f in fields(cls)} - {"noise"}
        return cls(**{name: found[name] for name in names}, noise=GradientNoise(**noise or {}))

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint; the noise, which depends on the layout, is kept apart."""
        return {name: value for name, value in asdict(self).items() if name != "noise"}

    def memory_updates(self, longest: int, period: int) -> float:
        """Updates at a period by which memories of gradients would have decayed as they have.

        Where a beta is b^C at an update of period C (`nlscale.optim.period`), their product is b to
        the sum of the periods.

        Args:
            longest: period of the group.
            period: in steps.
        """
        return (self.updates * longest - self.short) / period

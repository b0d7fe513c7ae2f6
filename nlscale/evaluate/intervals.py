"""95% intervals: of shares, and of what is a ratio of sums over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_Z = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """How many of how many, and the 95% interval of Wilson of the share.

    A sample that has several things to get right counts as the part of them that it has: then the
    interval is no narrower than that of samples that are all right or all wrong would be.
    """

    right: float
    of: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        n, p = self.of, self.share
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        # Exactly, where rounding would leave a little.
        return middle - half if self.right else 0.0, middle + half if self.right < n else 1.0

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share, "interval": list(self.interval)}


@dataclass(frozen=True)
class Ratio:
    """A sum over samples divided by another one, and the 95% interval over the samples.

    That is Student's, of the residuals `above - ratio * below` of each sample, which are
    independent where the samples are; None where there is one sample.
    """

    value: float
    interval: tuple[float, float] | None
    samples: int

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio | None:
        """Of the sums of each sample; None: those below are nothing."""
        total, count = sum(below), len(below)
        if not total:
            return None
        value = sum(above) / total
        if count < 2:
            return cls(value, None, count)
        from scipy.stats import t

        rest = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
        error = math.sqrt(rest * count / (count - 1)) / total
        half = float(t.ppf(0.975, count - 1)) * error
        return cls(value, (value - half, value + half), count)

    def described(self) -> dict[str, Any]:
        """For JSON."""
        interval = None if self.interval is None else list(self.interval)
        return {"value": self.value, "interval": interval, "samples": self.samples}

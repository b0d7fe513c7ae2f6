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
    worth: float | None = None
    """How many independent ones they say as much as; None: as many as there are."""

    @classmethod
    def of_groups(cls, right: Sequence[int], counted: Sequence[int]) -> Share:
        """Of what comes in groups, such as the targets of an example, which go right together.

        They are worth as many independent ones as have the variance of the share that the groups
        show; where none or all are right, as many as there are groups. Groups of one are
        independent themselves.
        """
        of, groups = sum(counted), len(counted)
        if of == groups:
            return cls(sum(right), of)
        share = sum(right) / of
        rest = sum((r - share * n) ** 2 for r, n in zip(right, counted, strict=True))
        if not rest or groups < 2:
            return cls(sum(right), of, float(groups))
        variance = rest * groups / (groups - 1) / of**2
        return cls(sum(right), of, min(float(of), share * (1 - share) / variance))

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        n, p = self.of if self.worth is None else self.worth, self.share
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        # Exactly, where rounding would leave a little.
        return (
            middle - half if self.right else 0.0,
            middle + half if self.right < self.of else 1.0,
        )

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

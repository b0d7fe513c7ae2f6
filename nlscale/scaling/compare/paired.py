"""Paired differences: their mean, an interval, and how many pairs would show a stated effect.

d_i = x_i - y_i of pairs i = 1..n that share a seed; what a seed does to both cancels. With mean m
and standard deviation s the interval is  m +- t s / sqrt(n),  t the quantile of Student's
distribution with n - 1 degrees of freedom. Fewer than three pairs decide nothing: figures that take
few values, such as "solved or not", agree in two of them by chance more often than is stated.
Resampling the pairs makes another (percentile
bootstrap), which assumes no shape but is too narrow for few pairs: verdicts follow the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 10_000
FEWEST = 3
"""Pairs below which nothing is decided."""
FEWEST_TO_RESAMPLE = 5
"""Pairs below which a bootstrap interval is not given: 4 pairs have 35 different resamples."""
POWER = 0.8
_MOST_PAIRS = 100_000


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, and what they allow to be said."""

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    """Standard deviation of the differences; None of a single pair."""
    interval: tuple[float, float] | None
    """Student's, at `level`; None of a single pair."""
    level: float
    """That each interval holds the true difference with: raised where several are looked at."""

    @property
    def resampled(self) -> tuple[float, float] | None:
        """The bootstrap's interval; None of fewer than 5 pairs."""
        if len(self.differences) < FEWEST_TO_RESAMPLE:
            return None
        return _resampled(np.asarray(self.differences), self.level)

    @property
    def verdict(self) -> str:
        """`lower`, `higher` or `undecided`."""
        if self.interval is None or len(self.differences) < FEWEST:
            return "undecided"
        if self.interval[0] <= 0 <= self.interval[1]:
            return "undecided"
        return "lower" if self.mean < 0 else "higher"

    def visible(self) -> float | None:
        """The smallest effect that so many pairs would show with a power of 80%."""
        if not self.deviation:
            return None
        n = len(self.differences)
        low, high = 0.0, self.deviation
        while _power(high, self.deviation, n, self.level) < POWER:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            if _power(middle, self.deviation, n, self.level) < POWER:
                low = middle
            else:
                high = middle
        return high

    def pairs_for(self, effect: float) -> int | None:
        """Pairs that would show an effect with a power of 80%, were the deviation the true one.

        None: of a single pair nothing is known, or more than 100,000 would be needed.
        """
        if self.deviation is None:
            return None
        low, high = FEWEST - 1, FEWEST
        while _power(effect, self.deviation, high, self.level) < POWER:
            low, high = high, 2 * high
            if high > _MOST_PAIRS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            if _power(effect, self.deviation, middle, self.level) < POWER:
                low = middle
            else:
                high = middle
        return high


def paired(differences: Sequence[float], level: float, comparisons: int = 1) -> Paired:
    """What pairs say of a difference.

    Args:
        differences: one a pair.
        level: with which all intervals of a table are to hold at once, such as 0.95.
        comparisons: intervals of the table; each is given the level 1 - (1 - level) / comparisons
            (Bonferroni), so that the share of tables with a false verdict is at most 1 - level.
    """
    each = 1 - (1 - level) / comparisons
    d = np.asarray(differences, dtype=np.float64)
    mean, n = float(d.mean()), len(d)
    plain = tuple(map(float, d))
    if n < 2:
        return Paired(plain, mean, None, None, each)
    deviation = float(d.std(ddof=1))
    half = float(stats.t.ppf((1 + each) / 2, n - 1)) * deviation / math.sqrt(n)
    return Paired(plain, mean, deviation, (mean - half, mean + half), each)


def _resampled(d: np.ndarray, level: float) -> tuple[float, float]:
    generator = np.random.default_rng(0)  # the same answer to the same question
    means = d[generator.integers(len(d), size=(_RESAMPLES, len(d)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _power(effect: float, deviation: float, n: int, level: float) -> float:
    """With which a paired t test of n pairs finds an effect, from the noncentral t."""
    if deviation == 0:
        return 1.0 if effect else 0.0
    shift = abs(effect) / deviation * math.sqrt(n)
    critical = float(stats.t.ppf((1 + level) / 2, n - 1))
    return float(stats.nct.sf(critical, n - 1, shift))

"""Percentile intervals by the pairs bootstrap: whole runs are drawn again, with replacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.fit import Fit
from nlscale.scaling.law.law import Array, Law
from nlscale.scaling.law.newton import minimise

RESAMPLES = 300
LEVEL = 0.9
WIDEST_SHARE = 0.4
"""Widest interval of a = beta / (alpha + beta) that still says how to split a budget."""
WIDEST_RATIO = 5.0
"""Largest ratio of the ends of the interval of alpha, and of beta."""
_NUDGE = np.array([0.3, 0.3, 0.2, 0.1, 0.1, 0.02])

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bootstrap:
    """Laws fitted to resamples.

    Attributes:
        laws: fields of shape (resamples,).
        level: the share of resamples that an interval holds.
        unconverged: how many of them did not reach a vanishing gradient.
    """

    laws: Law
    level: float
    unconverged: int

    @property
    def count(self) -> int:
        """The number of resamples."""
        return len(self.laws.E)

    def interval(self, values: Array) -> Interval:
        """The central `level` of values of shape (resamples,)."""
        low, high = self.band(values[:, None])
        return float(low[0]), float(high[0])

    def band(self, values: Array) -> tuple[Array, Array]:
        """The same for each column of (resamples, columns); infinities sort as largest."""
        tail = 50 * (1 - self.level)
        # An element, never a mean of two: one of them may be infinite.
        low = np.percentile(values, tail, axis=0, method="lower")
        high = np.percentile(values, 100 - tail, axis=0, method="higher")
        return low, high

    def doubts(self) -> list[str]:
        """Which intervals are wider than the stated limits; empty where none is."""
        found = []
        for name in ("alpha", "beta"):
            low, high = self.interval(getattr(self.laws, name))
            if high > WIDEST_RATIO * low:
                found.append(
                    f"the interval of {name} is {low:.3g} to {high:.3g}, wider than a factor of "
                    f"{WIDEST_RATIO:g}"
                )
        low, high = self.interval(self.laws.exponents[0])
        if high - low > WIDEST_SHARE:
            found.append(
                f"the interval of N_opt's exponent is {low:.2f} to {high:.2f}, wider than "
                f"{WIDEST_SHARE:g}"
            )
        return found


def bootstrap(
    fitted: Fit, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Bootstrap:
    """Refit `resamples` draws of the points, each from the optimum and the next best minima.

    A draw is a vector of counts, so that all of them are fitted together. One start besides the
    optimum at least is made where there is no other minimum: the optimum, perturbed.
    """
    rng = np.random.default_rng(seed)
    points = len(fitted.residuals)
    draws = rng.multinomial(points, np.full(points, 1 / points), size=resamples).astype(float)
    size = fitted.problem.size
    nudged = fitted.theta + rng.normal(size=size) * _NUDGE[:size]
    starts = np.concatenate([fitted.theta[None], nudged[None], fitted.others])
    each = len(starts)
    ends = minimise(fitted.problem, np.tile(starts, (resamples, 1)), np.repeat(draws, each, axis=0))
    best = ends.value.reshape(resamples, each).argmin(axis=1) + each * np.arange(resamples)
    laws = fitted.problem.law(ends.theta[best])
    return Bootstrap(laws, level, int((~ends.converged[best]).sum()))

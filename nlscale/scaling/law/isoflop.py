"""Approaches 1 and 2 of Hoffmann et al. 2022, beside the parametric fit; they share no assumption.

Both give N_opt ~ C^a and D_opt ~ C^b from measured minima alone, where the data have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.law import Array
from nlscale.scaling.law.points import Points, distinct

NEAR = 1.15
"""Runs whose FLOPs are within this factor of the smallest of a group have one budget."""
_FEWEST_OF_GROUP = 4
_FEWEST_GROUPS = 3
_FEWEST_OF_ENVELOPE = 5
_SPAN = 10.0


@dataclass(frozen=True)
class Minimum:
    """The best run at one budget: FLOPs, N, D, nats per token, and from how many points."""

    flops: float
    n: float
    d: float
    loss: float
    points: int


@dataclass(frozen=True)
class Frontier:
    """Minima over budgets and the exponents through them, or the reason there are none."""

    minima: tuple[Minimum, ...]
    a: float | None
    b: float | None
    reason: str | None


def isoflop(points: Points) -> Frontier:
    """Approach 2: in each group of near-equal compute, the vertex of a parabola in log N.

    A group counts with 4 distinct N, a parabola that opens upward, and a vertex between its
    smallest and largest N; the exponents need 3 groups.
    """
    minima, groups = [], _groups(points)
    for group in groups:
        found = _vertex(points, group)
        if found is not None:
            minima.append(found)
    if len(minima) < _FEWEST_GROUPS:
        reason = (
            f"{len(minima)} budgets have a minimum within their sizes, of {len(groups)} with "
            f"{_FEWEST_OF_GROUP} sizes at near-equal compute; {_FEWEST_GROUPS} are needed"
        )
        return Frontier(tuple(minima), None, None, reason)
    return Frontier(tuple(minima), *_exponents(minima), None)


def envelope(points: Points) -> Frontier:
    """Approach 1, of final losses: the best run of each budget that no cheaper run matches.

    Hoffmann et al. take whole training curves; here a run is its last point, so the envelope is
    only as fine as the grid, and noise and sizes that the grid lacks bias its exponents. It needs
    5 runs over a factor of 10 in compute.
    """
    order = np.lexsort((points.loss, points.flops))
    minima: list[Minimum] = []
    budget = 0.0
    for i in order:
        if minima and points.loss[i] >= minima[-1].loss:
            continue
        flops, n, d = (float(v[i]) for v in (points.flops, points.n, points.d))
        if flops <= NEAR * budget:
            minima.pop()  # of one budget only the best counts, whatever the rounding of its FLOPs
        else:
            budget = flops
        minima.append(Minimum(flops, n, d, float(points.loss[i]), points=1))
    span = minima[-1].flops / minima[0].flops
    if len(minima) < _FEWEST_OF_ENVELOPE or span < _SPAN:
        reason = (
            f"{len(minima)} runs are on the envelope, over a factor of {span:.3g} in compute; "
            f"{_FEWEST_OF_ENVELOPE} over {_SPAN:g} are needed"
        )
        return Frontier(tuple(minima), None, None, reason)
    return Frontier(tuple(minima), *_exponents(minima), None)


def _groups(points: Points) -> list[Array]:
    """Indices of the runs of each budget that has enough sizes, cheapest first."""
    order = np.argsort(points.flops)
    groups: list[list[int]] = []
    for i in order:
        if groups and points.flops[i] <= NEAR * points.flops[groups[-1][0]]:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    arrays = [np.array(group) for group in groups]
    return [group for group in arrays if distinct(points.n[group]) >= _FEWEST_OF_GROUP]


def _vertex(points: Points, group: Array) -> Minimum | None:
    log_n = np.log(points.n[group])
    middle = log_n.mean()
    curve, slope, level = np.polyfit(log_n - middle, points.loss[group], 2)
    if curve <= 0:
        return None
    at = -slope / (2 * curve)
    if not log_n.min() <= at + middle <= log_n.max():
        return None
    flops = float(np.exp(np.log(points.flops[group]).mean()))
    n = float(np.exp(at + middle))
    d = flops / (points.per_pair * n)
    return Minimum(flops, n, d, float(level - slope**2 / (4 * curve)), len(group))


def _exponents(minima: list[Minimum]) -> tuple[float, float]:
    log_c = np.log([m.flops for m in minima])
    a = np.polyfit(log_c, np.log([m.n for m in minima]), 1)[0]
    b = np.polyfit(log_c, np.log([m.d for m in minima]), 1)[0]
    return float(a), float(b)

"""What the periods of the levels cost: in loss, and in compute at equal loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nlscale.scaling.law.bootstrap import Bootstrap, Interval
from nlscale.scaling.law.fit import Fit
from nlscale.scaling.law.law import Array, Law
from nlscale.scaling.law.points import PERIODS, Points

_SAME = 0.01  # periods are told apart from here on, in their logarithm


@dataclass(frozen=True)
class Setting:
    """The runs of one period, and what it costs beside period 1.

    Attributes:
        period: the mean period of the levels, steps.
        periods: those of the levels ("1, 4, 16"), or "various"; None where only the mean is known.
        runs: how many.
        loss: G log2(period), nats per token.
        worth: FLOPs with which period 1 reaches the same loss, over those that were spent.
        beyond: by which factor those FLOPs are outside the measured; None where they are within.
        residual: mean of measured over fitted loss, less 1.
    """

    period: float
    periods: str | None
    runs: int
    loss: float
    loss_interval: Interval
    worth: float
    worth_interval: Interval
    beyond: float | None
    residual: float


@dataclass(frozen=True)
class PeriodCosts:
    """What each measured period costs; `worth` is at this many FLOPs, the most measured."""

    flops: float
    settings: tuple[Setting, ...]


def period_costs(points: Points, fitted: Fit, drawn: Bootstrap) -> PeriodCosts | None:
    """What each measured period costs, shortest first; None where the law does not know of them."""
    if points.period is None:
        return None
    flops = float(points.flops.max())
    logs = np.log(points.period)
    order = np.argsort(logs)
    groups = np.split(order, np.flatnonzero(np.diff(logs[order]) > _SAME) + 1)
    return PeriodCosts(flops, tuple(_setting(points, fitted, drawn, g, flops) for g in groups))


def at_period_1(points: Points, fitted: Fit) -> Points:
    """The points with what their periods cost taken off their losses."""
    if points.period is None:
        return points
    cost = fitted.law.period_cost(points.period)
    return replace(points, loss=points.loss - cost, period=None)


def warnings(points: Points) -> list[str]:
    """What a reader must know of the periods among the points; empty where there is nothing."""
    if points.period is None:
        if not points.periods_vary:
            return []
        return [
            "the levels of these runs have different periods, which the law does not know of; "
            "fit it with --period, or select one with --where"
        ]
    shortest = float(points.period.min())
    if shortest <= 1 + _SAME:
        return []
    return [
        f"no run has period 1, the shortest is {shortest:.3g}: costs are counted from a law that "
        f"was not measured"
    ]


def _setting(
    points: Points, fitted: Fit, drawn: Bootstrap, group: np.ndarray, flops: float
) -> Setting:
    assert points.period is not None
    period = float(np.exp(np.log(points.period[group]).mean()))
    names = {points.rows[i].get(PERIODS) for i in group}
    law, laws = fitted.law, drawn.laws

    def worth(of: Law) -> Array:
        loss = of.optimum(flops, points.per_pair)[2] + of.period_cost(period)
        return of.compute_at(loss, points.per_pair) / flops

    share = float(worth(law))
    measured = float(points.flops.min()) / flops
    beyond = max(share, measured / share)
    return Setting(
        period=period,
        periods=names.pop() if len(names) == 1 else "various",
        runs=len(group),
        loss=float(law.period_cost(period)),
        loss_interval=drawn.interval(laws.period_cost(period)),
        worth=share,
        worth_interval=drawn.interval(worth(laws)),
        beyond=beyond if beyond > 1 + 1e-6 else None,
        residual=float(np.expm1(-fitted.residuals[group].mean())),
    )

"""Everything that is said of one set of points, and of two families at equal loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.bootstrap import LEVEL, RESAMPLES, Bootstrap, Interval, bootstrap
from nlscale.scaling.law.fit import Fit, fit, leave_out_largest
from nlscale.scaling.law.isoflop import Frontier, envelope, isoflop
from nlscale.scaling.law.law import NAMES, Law
from nlscale.scaling.law.period import PeriodCosts, at_period_1, period_costs, warnings
from nlscale.scaling.law.points import Points

MOST_SPREAD = 1.1


@dataclass(frozen=True)
class Optimum:
    """What a budget buys: FLOPs, parameters, tokens, nats per token, and their intervals.

    `beyond` says by which factor flops, N and D are above the largest measured (or, for N and D,
    under the smallest); empty where the optimum is within the data. `refused` is why there are no
    numbers.
    """

    flops: float
    beyond: dict[str, float]
    refused: str | None
    n: float | None = None
    d: float | None = None
    loss: float | None = None
    intervals: dict[str, Interval] | None = None


@dataclass(frozen=True)
class Analysis:
    """A fit, its uncertainty, and the approaches beside it.

    Optima, isoFLOP and envelope are those of period 1 where the law knows of periods.
    """

    points: Points
    fit: Fit
    bootstrap: Bootstrap
    optimal: tuple[Optimum, ...]
    isoflop: Frontier
    envelope: Frontier
    sensitivity: tuple[tuple[int, Law], ...]
    period: PeriodCosts | None
    ill_conditioned: str | None
    warnings: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the law."""
        return NAMES if self.period is None else (*NAMES, "G")


@dataclass(frozen=True)
class Multiplier:
    """FLOPs that `reference` needs for a loss, over those that `family` needs for it.

    `beyond` is the factor by which either is outside its measured compute, None where both are
    within.
    """

    reference: str
    family: str
    loss: float
    value: float
    interval: Interval
    beyond: float | None


def analyse(
    points: Points,
    budgets: tuple[float, ...] = (),
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Analysis:
    """Fit, resample, and answer the budgets (FLOPs).

    Raises:
        UserError: too few points.
    """
    fitted = fit(points.check(), seed)
    drawn = bootstrap(fitted, resamples, level, seed)
    doubts = [*fitted.doubts(), *drawn.doubts()]
    ill = "; ".join(doubts) or None
    lines = warnings(points)
    if points.per_pair_spread > MOST_SPREAD:
        lines.append(
            f"flops / (N D) varies by a factor of {points.per_pair_spread:.3g}; optima use its "
            f"mean, {points.per_pair:.3g}"
        )
    if drawn.unconverged > 0.02 * drawn.count:
        lines.append(f"{drawn.unconverged} of {drawn.count} resamples did not converge")
    plain = at_period_1(points, fitted)
    return Analysis(
        points=points,
        fit=fitted,
        bootstrap=drawn,
        optimal=tuple(_optimum(points, fitted, drawn, flops, ill) for flops in budgets),
        isoflop=isoflop(plain),
        envelope=envelope(plain),
        sensitivity=tuple(leave_out_largest(fitted)),
        period=period_costs(points, fitted, drawn),
        ill_conditioned=ill,
        warnings=tuple(lines),
    )


def multipliers(families: dict[str, Analysis], losses: int = 5) -> list[Multiplier]:
    """The compute multiplier of every family after the first against the first, at equal loss.

    Where the law knows of periods, at period 1.
    At each of `losses` losses that both frontiers reach within what was measured, it is
    C_first(L) / C_other(L): above 1 the other family needs less. Where the measured ranges share
    no loss, the one loss is the best that both laws say their largest measured compute reaches.
    The families' resamples are independent, so they are paired as drawn. A loss outside what was
    measured is left out where either fit is ill-conditioned.
    """
    (reference, first), *others = families.items()
    found = []
    for name, other in others:
        pair = (first, other)
        # The frontier's loss at the largest and at the smallest measured compute of each.
        worst = min(_frontier_loss(one, float(one.points.flops.min())) for one in pair)
        best = max(_frontier_loss(one, float(one.points.flops.max())) for one in pair)
        for loss in np.linspace(worst, best, losses) if worst > best else (best,):
            costs = [float(one.fit.law.compute_at(loss, one.points.per_pair)) for one in pair]
            count = min(one.bootstrap.count for one in pair)
            drawn = [one.bootstrap.laws.compute_at(loss, one.points.per_pair) for one in pair]
            with np.errstate(invalid="ignore"):
                ratios = drawn[0][:count] / drawn[1][:count]
            # inf / inf: neither reaches the loss in this resample, which says nothing.
            ratios = ratios[np.isfinite(ratios) | np.isposinf(ratios)]
            beyond = max(
                max(cost / float(one.points.flops.max()), float(one.points.flops.min()) / cost)
                for cost, one in zip(costs, pair, strict=True)
            )
            outside = beyond if beyond > 1 + 1e-6 else None
            if outside and any(one.ill_conditioned for one in pair):
                continue
            interval = first.bootstrap.interval(ratios)
            value = costs[0] / costs[1]
            found.append(Multiplier(reference, name, float(loss), value, interval, outside))
    return found


def _frontier_loss(one: Analysis, flops: float) -> float:
    return float(one.fit.law.optimum(flops, one.points.per_pair)[2])


def _optimum(
    points: Points, fitted: Fit, drawn: Bootstrap, flops: float, ill: str | None
) -> Optimum:
    n, d, loss = (float(v) for v in fitted.law.optimum(flops, points.per_pair))
    beyond = {}
    for name, value, measured in (
        ("flops", flops, points.flops), ("N", n, points.n), ("D", d, points.d)
    ):  # fmt: skip
        factor = max(value / float(measured.max()), float(measured.min()) / value)
        if factor > 1 + 1e-9:
            beyond[name] = factor
    if beyond and ill:
        return Optimum(flops, beyond, ill)
    many = drawn.laws.optimum(flops, points.per_pair)
    intervals = {k: drawn.interval(v) for k, v in zip(("N", "D", "loss"), many, strict=True)}
    return Optimum(flops, beyond, None, n, d, loss, intervals)

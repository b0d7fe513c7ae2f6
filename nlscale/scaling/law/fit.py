"""One fit: starts by variable projection, every one polished, the optimum checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.law import Array, Law
from nlscale.scaling.law.newton import Minima, minimise
from nlscale.scaling.law.objective import EXPONENTS, PERIOD_SHARES, SMALLEST_TERM, Problem
from nlscale.scaling.law.points import Points

LARGEST_CONDITION = 1e8
"""Of J'J with columns of length 1. Noise of the losses is magnified by up to its square root, and
a fifth digit of a loss is noise; grids that vary N and D freely are near 1e3."""
MOST_EXPLAINED = 0.9
"""Share of the variance of log2(period) that log N and log D may explain; from there on a cost is
read off the form of the law alone (a variance inflation factor of 10)."""
MOST_SHARED = 0.999
"""Share of the variance of log D that log N may explain. Beyond, as where tokens keep a proportion
to parameters within some 4%, noise decides which term is which, or that one vanishes; where one
does, the condition number at the optimum shows nothing."""

_GRID = np.geomspace(0.05, 2.0, 12)
_HOPS_FROM, _HOPS = 8, 8
_HOP = np.array([0.5, 0.5, 0.3, 0.15, 0.15, 0.02])
_AGREE = 1e-6  # of the objective


@dataclass(frozen=True)
class Fit:
    """A law fitted to points, and how far to trust that it is the optimum.

    Attributes:
        law: E, A, B in nats per token, alpha, beta, and G where periods are fitted; shape ().
        objective: sum of Huber (delta 1e-3) of log-loss residuals at the optimum.
        gradient: largest component of its gradient there, over delta times the points.
        starts: how many starts were polished; `agreeing` of them ended within 1e-6 of the optimum.
        converged: the gradient vanishes and at least two starts agree.
        condition: condition number of J'J at the optimum, columns scaled to length 1.
        residuals: log predicted - log measured loss, of shape (points,).
        others: theta of the next best distinct minima, of shape (at most 3, parameters).
    """

    law: Law
    objective: float
    gradient: float
    starts: int
    agreeing: int
    converged: bool
    condition: float
    residuals: Array
    theta: Array
    others: Array
    problem: Problem

    def doubts(self) -> list[str]:
        """Why the optimum does not determine the law; empty where it does."""
        found = []
        if not self.converged:
            found.append(
                f"the optimiser did not converge (scaled gradient {self.gradient:.1e}, "
                f"{self.agreeing} of {self.starts} starts agree)"
            )
        terms = zip(("A/N^alpha", "B/D^beta", "E"), self.theta[:3], strict=True)
        found += [f"the term {name} vanishes" for name, v in terms if v <= SMALLEST_TERM + 1e-3]
        for name, value in (("alpha", self.law.alpha), ("beta", self.law.beta)):
            found += [
                f"{name} is at its bound {bound:g}"
                for bound in EXPONENTS
                if abs(float(value) - bound) < 1e-6
            ]
        if (
            self.problem.z is not None
            and np.min(np.abs(self.theta[5] - np.array(PERIOD_SHARES))) < 1e-6
        ):
            found.append(f"G is at its bound {float(self.law.G):.3g}")
        shared = float(np.corrcoef(self.problem.x, self.problem.y)[0, 1] ** 2)
        if shared > MOST_SHARED:
            found.append(
                f"N explains {shared:.4%} of the variance of D (of their logarithms): "
                f"N and D do not vary independently enough"
            )
        explained = _explained(self.problem)
        if explained > MOST_EXPLAINED:
            found.append(
                f"N and D explain {explained:.0%} of the variance of the periods: their cost "
                f"cannot be told from that of size and tokens"
            )
        if self.condition > LARGEST_CONDITION:
            axes = "N and D" if self.problem.z is None else "N, D and the period"
            found.append(
                f"condition number {self.condition:.1e} is above {LARGEST_CONDITION:.0e}: {axes} "
                f"do not vary independently enough"
            )
        return found


def fit(points: Points, seed: int = 0) -> Fit:
    """Fit L = E + A / N^alpha + B / D^beta as approach 3 of Hoffmann et al. 2022 means to.

    With G log2(period) beside it where the points have periods. For given alpha and beta the law is
    linear in E, A, B and G: least squares of the relative residuals, non-negative but for G, gives
    them on a grid of 12 x 12 exponents (variable projection). Each start
    is polished to a vanishing gradient by Newton's method; then the 8 best minima are perturbed,
    8 times each, and polished again.

    Args:
        points: at least 8, as `Points.check` wants them.
        seed: of the perturbations.
    """
    problem = Problem.of(points.n, points.d, points.loss, points.period)
    starts = _grid(problem)
    weights = np.ones(len(points.loss))
    first = minimise(problem, starts, np.broadcast_to(weights, (len(starts), len(weights))))
    best = first.theta[_distinct(first)[:_HOPS_FROM]]
    noise = np.random.default_rng(seed).normal(size=(_HOPS * len(best), problem.size))
    hops = np.repeat(best, _HOPS, axis=0) + noise * _HOP[: problem.size]
    second = minimise(problem, hops, np.broadcast_to(weights, (len(hops), len(weights))))
    ends = Minima(
        np.concatenate([first.theta, second.theta]),
        np.concatenate([first.value, second.value]),
        np.concatenate([first.gradient, second.gradient]),
    )
    order = _distinct(ends)
    least, theta = float(ends.value[order[0]]), ends.theta[order[0]]
    # 1e-18: of an exact law the objective is 0 but for rounding.
    agreeing = int((ends.value <= least * (1 + _AGREE) + 1e-18).sum())
    gradient = float(ends.gradient[order[0]])
    return Fit(
        law=problem.law(theta),
        objective=least,
        gradient=gradient,
        starts=len(ends.value),
        agreeing=agreeing,
        converged=bool(ends.converged[order[0]] and agreeing > 1),
        condition=_condition(problem, theta),
        residuals=problem.residuals(theta[None])[0],
        theta=theta,
        others=ends.theta[order[1:4]],
        problem=problem,
    )


def leave_out_largest(fitted: Fit, counts: tuple[int, ...] = (1, 2, 4, 8)) -> list[tuple[int, Law]]:
    """The law refitted without the k points of largest residual, for each k up to a quarter."""
    order = np.argsort(-np.abs(fitted.residuals))
    counts = tuple(k for k in counts if 4 * k <= len(order))
    starts = np.concatenate([fitted.theta[None], fitted.others])
    laws = []
    for k in counts:
        weights = np.ones(len(order))
        weights[order[:k]] = 0
        ends = minimise(
            fitted.problem, starts, np.broadcast_to(weights, (len(starts), len(weights)))
        )
        laws.append((k, fitted.problem.law(ends.theta[np.argmin(ends.value)])))
    return laws


def _grid(problem: Problem) -> Array:
    """theta of the best E, A, B and G at each pair of exponents, of shape (144, parameters)."""
    from scipy.optimize import nnls

    loss = np.exp(problem.log_loss)
    floor = 1e-3 * loss.mean()  # a start at 0 would stay there: the gradient by its logarithm is 0
    starts = []
    for alpha in _GRID:
        for beta in _GRID:
            terms = [np.exp(-alpha * problem.x), np.exp(-beta * problem.y), np.ones_like(loss)]
            if problem.z is not None:
                terms += [problem.z, -problem.z]  # of either sign
            found, _ = nnls(np.stack(terms, axis=1) / loss[:, None], np.ones_like(loss))
            share = [found[3] - found[4]] if problem.z is not None else []
            starts.append([*np.log(np.maximum(found[:3], floor)), alpha, beta, *share])
    return np.array(starts)


def _distinct(minima: Minima) -> list[int]:
    """Indices of the minima, best first, without those that repeat a better one."""
    kept: list[int] = []
    for index in np.argsort(minima.value):
        theta = minima.theta[index]
        if all(np.abs(theta - minima.theta[k]).max() > 1e-3 for k in kept):
            kept.append(int(index))
        if len(kept) == _HOPS_FROM:
            break
    return kept


def _explained(problem: Problem) -> float:
    """The share of the variance of z that a linear function of x and y explains; 0 without z."""
    if problem.z is None:
        return 0.0
    axes = np.stack([np.ones_like(problem.x), problem.x, problem.y], axis=1)
    rest = problem.z - axes @ np.linalg.lstsq(axes, problem.z, rcond=None)[0]
    return float(1 - rest.var() / problem.z.var())


def _condition(problem: Problem, theta: Array) -> float:
    jacobian = problem.jacobian(problem.shares(theta[None]))[0]
    lengths = np.linalg.norm(jacobian, axis=0)
    if not lengths.all():
        return float("inf")
    return float(np.linalg.cond(jacobian / lengths) ** 2)

"""A damped Newton method in a box, for many small fits at once.

The step is taken in the metric M of iteratively reweighted least squares: with M = C C' and the
eigenvalues l of C^-1 H C^-T, it is -(|l| + mu)^-1 times the gradient. At mu = 0 that is Newton's
(away from saddle points); as mu grows it becomes a short reweighted least-squares step, which goes
down from anywhere. Every fit has its own mu.

It is kept for its speed beside scipy 1.17.1, which minimises one fit at a time. L-BFGS-B in the
same box finds the same optimum (objectives within 1e-10) of 61 synthetic sets of 8 to 245 points,
in 3 times the time at 245 points and up to 17 times at 20 or fewer; `nlscale fit` of 245 rows with
300 resamples takes 2.3 times as long with it, the resamples of 75 rows with periods 9 times. Of 600
resamples of ill-conditioned sets of at most 20 points, in 4 to 11 times the time, it ends higher in
37 and lower in 25, of which 24 are called unconverged here. SLSQP (2.0 times for `nlscale fit`)
misses one of the 61 optima by 4e-3; BFGS, trust-ncg, trust-exact and least_squares take 5 to 31
times for resamples, and each but least_squares with a reweighting loss misses an optimum too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.law import Array
from nlscale.scaling.law.objective import DELTA, Problem

TOLERANCE = 1e-7
"""Largest component of the projected gradient, over delta times the weights, of a converged fit."""
_BELOW_ROUNDING = 1e-14
_STUCK = 1e12
_TOGETHER = 256  # fits at once: more only leave the cache


@dataclass(frozen=True)
class Minima:
    """Where each fit ended: theta (fits, parameters), objective and scaled gradient (fits,)."""

    theta: Array
    value: Array
    gradient: Array

    @property
    def converged(self) -> np.ndarray:
        """Which ended where the projected gradient vanishes, of shape (fits,)."""
        return self.gradient <= TOLERANCE


def minimise(problem: Problem, starts: Array, weights: Array, iterations: int = 400) -> Minima:
    """Go down from every start until the gradient vanishes or no step goes down.

    Args:
        problem: the points.
        starts: theta, of shape (fits, parameters); moved into the bounds.
        weights: how often each point counts, of shape (fits, points).
        iterations: at most so many steps.
    """
    parts = [
        _minimise(problem, starts[i : i + _TOGETHER], weights[i : i + _TOGETHER], iterations)
        for i in range(0, len(starts), _TOGETHER)
    ]
    theta = np.concatenate([part.theta for part in parts])
    return Minima(
        theta,
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.gradient for part in parts]),
    )


def _minimise(problem: Problem, starts: Array, weights: Array, iterations: int) -> Minima:
    theta = np.clip(starts, problem.lower, problem.upper)
    value, gradient, hessian, majorant = problem.derivatives(theta, weights)
    damping = np.ones(len(theta))
    scale = DELTA * weights.sum(axis=1)
    going = np.arange(len(theta))
    for _ in range(iterations):
        projected = np.abs(_projected(problem, theta[going], gradient[going])).max(axis=1)
        going = going[(projected > _BELOW_ROUNDING * scale[going]) & (damping[going] < _STUCK)]
        if not len(going):
            break
        step = _step(
            problem, theta[going], gradient[going], hessian[going], majorant[going], damping[going]
        )
        tried = np.clip(theta[going] + step, problem.lower, problem.upper)
        lower = problem.value(tried, weights[going]) < value[going]
        damping[going] = np.where(lower, np.maximum(damping[going] / 5, 1e-12), damping[going] * 4)
        moved = going[lower]
        if len(moved):
            theta[moved] = tried[lower]
            new = problem.derivatives(theta[moved], weights[moved])
            value[moved], gradient[moved], hessian[moved], majorant[moved] = new
    projected = np.abs(_projected(problem, theta, gradient)).max(axis=1)
    return Minima(theta, value, projected / scale)


def _step(
    problem: Problem,
    theta: Array,
    gradient: Array,
    hessian: Array,
    majorant: Array,
    damping: Array,
) -> Array:
    free = _projected(problem, theta, gradient) != 0
    both = free[:, :, None] & free[:, None, :]
    eye = np.eye(problem.size)
    # A coordinate held at its bound is taken out: it neither moves nor couples.
    metric = np.where(both, majorant, eye)
    curvature = np.where(both, hessian, eye)
    size = np.sqrt(np.maximum(np.einsum("fii->fi", metric), 1e-300))
    scaled = metric / (size[:, :, None] * size[:, None, :])
    root = np.linalg.cholesky(scaled + 1e-10 * eye)
    inverse = np.linalg.inv(root) / size[:, None, :]
    turned = inverse @ curvature @ inverse.swapaxes(1, 2)
    values, vectors = np.linalg.eigh(0.5 * (turned + turned.swapaxes(1, 2)))
    slope = np.einsum(
        "fij,fjk,fk->fi", vectors.swapaxes(1, 2), inverse, np.where(free, gradient, 0)
    )
    along = -slope / (np.abs(values) + damping[:, None])
    step = np.einsum("fji,fjk,fk->fi", inverse, vectors, along)
    # The model holds near by only: no parameter moves by more than 1 (a factor of e) at once.
    longest = np.abs(step).max(axis=1, keepdims=True)
    return np.asarray(step / np.maximum(longest, 1.0))


def _projected(problem: Problem, theta: Array, gradient: Array) -> Array:
    """The gradient, with 0 where it pushes a coordinate out of the box."""
    out = (theta <= problem.lower) & (gradient > 0) | (theta >= problem.upper) & (gradient < 0)
    return np.where(out, 0.0, gradient)

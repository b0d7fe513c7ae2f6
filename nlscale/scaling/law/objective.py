"""The objective of Hoffmann et al. 2022, approach 3, with its derivatives, for many fits at once.

    S = sum_i w_i Huber(log P_i - log L_i),  delta = 1e-3
    P_i = exp(a - alpha x_i) + exp(b - beta y_i) + exp(e)  [ + p z_i where periods are fitted ]

The sum is a SUM over points, never a mean: divided by n it would be so small that an optimiser's
default tolerance stops it early, which is what went wrong in the original fit (Besiroglu et al.
2024, "Chinchilla Scaling: A replication attempt").

x and y are log N and log D less their means. That changes no optimum, only the meaning of a and b
(the logarithm of a term at the centre of the data), and takes the correlation of a with alpha
away, which is what makes the uncentred problem slow. z is log2 of the period, in units in which
p is the cost of the longest one as a share of the mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law.law import Array, Law

DELTA = 1e-3
"""Of log loss: beyond 0.1 % of the loss a residual counts linearly."""
EXPONENTS = (0.02, 3.0)
"""Bounds of alpha and beta; a fit that ends on one has not found an exponent."""
SMALLEST_TERM = -12.0
"""Lower bound of a, b and e: a term of 6e-6 nats at the centre of the data is none."""
PERIOD_SHARES = (-0.5, 1.0)
"""Bounds of p."""
_LEAST_SHARE = 0.05  # of the other terms that a period leaves, however much it pays


@dataclass(frozen=True)
class Problem:
    """Measured points, centred; each array has shape (points,), the bounds (parameters,).

    Parameters are theta = (a, b, e, alpha, beta), of shape (fits, 5); with p, of shape (fits, 6),
    where there is a z.
    """

    x: Array
    y: Array
    z: Array | None
    log_loss: Array
    centre: tuple[float, float]
    doubling: float
    """Nats that a doubling of the period costs at p = 1."""
    lower: Array
    upper: Array

    @classmethod
    def of(cls, n: Array, d: Array, loss: Array, period: Array | None = None) -> Problem:
        """Of parameters, tokens and nats per token, all positive, and perhaps periods from 1."""
        log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
        centre = float(log_n.mean()), float(log_d.mean())
        # No term can be much above the largest loss where the data are.
        most = float(log_loss.max())
        lower = np.array([SMALLEST_TERM] * 3 + [EXPONENTS[0]] * 2)
        upper = np.array([most + 3, most + 3, most + 1] + [EXPONENTS[1]] * 2)
        z, doubling = None, 0.0
        if period is not None:
            doublings = np.log2(period)
            doubling = float(loss.mean() / doublings.max())
            z = doubling * doublings
            lower, upper = np.append(lower, PERIOD_SHARES[0]), np.append(upper, PERIOD_SHARES[1])
        return cls(
            log_n - centre[0], log_d - centre[1], z, log_loss, centre, doubling, lower, upper
        )

    @property
    def size(self) -> int:
        """Parameters of a fit."""
        return len(self.lower)

    def law(self, theta: Array) -> Law:
        """The law or laws of `theta`, of shape (..., parameters)."""
        a, b, e, alpha, beta, *share = np.moveaxis(theta, -1, 0)
        first, second = a + alpha * self.centre[0], b + beta * self.centre[1]
        of_period = share[0] * self.doubling if share else np.zeros_like(e)
        return Law(np.exp(e), np.exp(first), np.exp(second), alpha, beta, of_period)

    def theta(self, law: Law) -> Array:
        """The inverse of `law`."""
        a = np.log(law.A) - law.alpha * self.centre[0]
        b = np.log(law.B) - law.beta * self.centre[1]
        columns = [a, b, np.log(law.E), law.alpha, law.beta]
        if self.z is not None:
            columns.append(law.G / self.doubling)
        return np.stack(columns, axis=-1)

    def residuals(self, theta: Array) -> Array:
        """log predicted - log measured loss, of shape (fits, points)."""
        return self._terms(theta)[0]

    def value(self, theta: Array, weights: Array) -> Array:
        """S of each fit, of shape (fits,); `weights` has shape (fits, points)."""
        return np.asarray((weights * _huber(self._terms(theta)[0])).sum(axis=-1))

    def gradient(self, theta: Array, weights: Array) -> Array:
        """dS / dtheta, of the shape of theta."""
        residual, shares = self._terms(theta)
        return self._gradient(weights * np.clip(residual, -DELTA, DELTA), shares)

    def derivatives(self, theta: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
        """Value (fits,), gradient, Hessian and its majorant (fits, parameters, parameters).

        The Hessian is exact but where a residual is +-delta, where it jumps. The majorant is that
        of iteratively reweighted least squares: J' diag(w psi(r) / r) J.
        """
        residual, shares = self._terms(theta)
        size = np.abs(residual)
        slope = weights * np.clip(residual, -DELTA, DELTA)
        inside = weights * (size <= DELTA)
        jacobian = self.jacobian(shares)
        # Second derivative of log P: sum_k s_k t_k t_k' - J J', with s_k the share of term k and
        # t_k the gradient of its logarithm; the term of the period is linear.
        hessian = np.matmul((jacobian * (inside - slope)[..., None]).swapaxes(1, 2), jacobian)
        for k, (i, j, at) in enumerate(((0, 3, self.x), (1, 4, self.y))):
            share = slope * shares[k]
            hessian[:, i, i] += share.sum(axis=1)
            cross = share @ at
            hessian[:, i, j] -= cross
            hessian[:, j, i] -= cross
            hessian[:, j, j] += share @ (at * at)
        hessian[:, 2, 2] += (slope * shares[2]).sum(axis=1)
        reweighted = weights * (DELTA / np.maximum(size, DELTA))
        majorant = np.matmul((jacobian * reweighted[..., None]).swapaxes(1, 2), jacobian)
        value = (weights * _huber(residual)).sum(axis=1)
        return value, self._gradient(slope, shares), hessian, majorant

    def jacobian(self, shares: Array) -> Array:
        """Of the residuals, (fits, points, parameters), from `shares`."""
        first, second, third, *period = shares
        columns = [first, second, third, -first * self.x, -second * self.y, *period]
        return np.stack(columns, axis=-1)

    def shares(self, theta: Array) -> Array:
        """What part of the predicted loss each term is, of shape (3, fits, points).

        With a z a fourth: that of the term of the period at p = 1.
        """
        return self._terms(theta)[1]

    def _gradient(self, slope: Array, shares: Array) -> Array:
        first, second, third, *period = slope * shares
        sums = [v.sum(axis=-1) for v in (first, second, third)]
        columns = [*sums, -(first @ self.x), -(second @ self.y), *(v.sum(axis=-1) for v in period)]
        return np.stack(columns, axis=-1)

    def _terms(self, theta: Array) -> tuple[Array, Array]:
        a, b, e, alpha, beta, *share = theta.T[..., None]
        terms = np.stack([a - alpha * self.x, b - beta * self.y, e + 0 * self.x])
        largest = terms.max(axis=0)
        parts = np.exp(terms - largest)
        total = parts.sum(axis=0)
        if self.z is None:
            return largest + np.log(total) - self.log_loss, parts / total
        unit = self.z * np.exp(-largest)
        whole = total + share[0] * unit
        # Far from any data, where a period would pay more than there is: the loss stays positive.
        near = whole > _LEAST_SHARE * total
        parts /= np.where(near, whole, total)
        whole = np.where(near, whole, _LEAST_SHARE * total)
        shares = np.concatenate([parts, np.where(near, unit / whole, 0.0)[None]])
        return largest + np.log(whole) - self.log_loss, shares


def _huber(residual: Array) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    from scipy.special import huber

    return np.asarray(huber(DELTA, residual))

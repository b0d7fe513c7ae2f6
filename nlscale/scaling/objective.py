"""The objective of Hoffmann et al. 2022, approach 3, with its derivatives, for many fits at once.

    S = sum_i w_i Huber(LSE(a - alpha x_i, b - beta y_i, e) - log L_i),  delta = 1e-3

The sum is a SUM over points, never a mean: divided by n it would be so small that an optimiser's
default tolerance stops it early, which is what went wrong in the original fit (Besiroglu et al.
2024, "Chinchilla Scaling: A replication attempt").

x and y are log N and log D less their means. That changes no optimum, only the meaning of a and b
(the logarithm of a term at the centre of the data), and takes the correlation of a with alpha
away, which is what makes the uncentred problem slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.scaling.law import Array, Law

DELTA = 1e-3
"""Of log loss: beyond 0.1 % of the loss a residual counts linearly."""
EXPONENTS = (0.02, 3.0)
"""Bounds of alpha and beta; a fit that ends on one has not found an exponent."""
SMALLEST_TERM = -12.0
"""Lower bound of a, b and e: a term of 6e-6 nats at the centre of the data is none."""


@dataclass(frozen=True)
class Problem:
    """Measured points, centred; each array has shape (points,), the bounds (5,).

    Parameters are theta = (a, b, e, alpha, beta), of shape (fits, 5).
    """

    x: Array
    y: Array
    log_loss: Array
    centre: tuple[float, float]
    lower: Array
    upper: Array

    @classmethod
    def of(cls, n: Array, d: Array, loss: Array) -> Problem:
        """Of parameters, tokens and nats per token, all positive."""
        log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
        centre = float(log_n.mean()), float(log_d.mean())
        # No term can be much above the largest loss where the data are.
        most = float(log_loss.max())
        lower = np.array([SMALLEST_TERM] * 3 + [EXPONENTS[0]] * 2)
        upper = np.array([most + 3, most + 3, most + 1] + [EXPONENTS[1]] * 2)
        return cls(log_n - centre[0], log_d - centre[1], log_loss, centre, lower, upper)

    def law(self, theta: Array) -> Law:
        """The law or laws of `theta`, of shape (..., 5)."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        first, second = a + alpha * self.centre[0], b + beta * self.centre[1]
        return Law(np.exp(e), np.exp(first), np.exp(second), alpha, beta)

    def theta(self, law: Law) -> Array:
        """The inverse of `law`."""
        a = np.log(law.A) - law.alpha * self.centre[0]
        b = np.log(law.B) - law.beta * self.centre[1]
        return np.stack([a, b, np.log(law.E), law.alpha, law.beta], axis=-1)

    def residuals(self, theta: Array) -> Array:
        """log predicted - log measured loss, of shape (fits, points)."""
        return self._terms(theta)[0]

    def value(self, theta: Array, weights: Array) -> Array:
        """S of each fit, of shape (fits,); `weights` has shape (fits, points)."""
        return np.asarray((weights * huber(self._terms(theta)[0])).sum(axis=-1))

    def gradient(self, theta: Array, weights: Array) -> Array:
        """dS / dtheta, of shape (fits, 5)."""
        residual, shares = self._terms(theta)
        return self._gradient(weights * np.clip(residual, -DELTA, DELTA), shares)

    def derivatives(self, theta: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
        """Value (fits,), gradient (fits, 5), Hessian and its majorant (fits, 5, 5).

        The Hessian is exact but where a residual is +-delta, where it jumps. The majorant is that
        of iteratively reweighted least squares: J' diag(w psi(r) / r) J.
        """
        residual, shares = self._terms(theta)
        size = np.abs(residual)
        slope = weights * np.clip(residual, -DELTA, DELTA)
        inside = weights * (size <= DELTA)
        jacobian = self.jacobian(shares)
        # Second derivative of log-sum-exp: sum_k p_k z_k z_k' - J J', z_k the gradient of term k.
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
        value = (weights * huber(residual)).sum(axis=1)
        return value, self._gradient(slope, shares), hessian, majorant

    def jacobian(self, shares: Array) -> Array:
        """Of the residuals, (fits, points, 5), from the share of each term in the loss."""
        first, second, third = shares
        return np.stack([first, second, third, -first * self.x, -second * self.y], axis=-1)

    def shares(self, theta: Array) -> Array:
        """What part of the predicted loss each term is, of shape (3, fits, points)."""
        return self._terms(theta)[1]

    def _gradient(self, slope: Array, shares: Array) -> Array:
        first, second, third = slope * shares
        sums = [v.sum(axis=-1) for v in (first, second, third)]
        return np.stack([*sums, -(first @ self.x), -(second @ self.y)], axis=-1)

    def _terms(self, theta: Array) -> tuple[Array, Array]:
        a, b, e, alpha, beta = theta.T[..., None]
        terms = np.stack([a - alpha * self.x, b - beta * self.y, e + 0 * self.x])
        largest = terms.max(axis=0)
        parts = np.exp(terms - largest)
        total = parts.sum(axis=0)
        return largest + np.log(total) - self.log_loss, parts / total


def huber(residual: Array) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    return np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))

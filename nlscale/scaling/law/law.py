"""The law L(N, D) = E + A / N^alpha + B / D^beta, and the compute-optimal frontier it implies.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", equations 2 and 4. N is in
parameters, D in tokens, L in nats per token, compute in FLOPs: C = k N D, with k = 6 by default.

Where a sweep varies the periods of the levels, the law has one more term,

    L(N, D, period) = E + A / N^alpha + B / D^beta + G log2(period)

with the geometric mean of the levels' periods in steps, so that log2(period) is the mean number of
doublings of a level. G is nats a doubling, and negative where a period pays; period 1 costs
nothing. The logarithm is a **[choice]**: of four equal levels (10.8M parameters, one seed) periods
1, 2, 4, 8 cost 0.0037 nats and periods 1, 4, 16, 64 cost 0.0098 to 0.0102, a ratio of 2.7, where
log2(period) says 2, period - 1 says 3.8, and differences between seeds allow both. An exponent
beside G would need more periods than a sweep has; `nlscale fit` shows what is left at each period.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NAMES = ("E", "A", "B", "alpha", "beta")
"""What every law has; one with periods also has G."""
FLOPS_PER_PARAMETER_TOKEN = 6.0
"""Forward and backward pass of a dense model: 2 + 4 FLOPs a parameter and token."""


@dataclass(frozen=True)
class Law:
    """One law, or one a resample: every field has shape () or (resamples,).

    `E`, `A` and `B` are in nats per token (A at N = 1, B at D = 1); the exponents have no unit; `G`
    is in nats per token a doubling of the period, 0 where it was not fitted.
    """

    E: Array
    A: Array
    B: Array
    alpha: Array
    beta: Array
    G: Array

    @classmethod
    def of(
        cls,
        E: ArrayLike,
        A: ArrayLike,
        B: ArrayLike,
        alpha: ArrayLike,
        beta: ArrayLike,
        G: ArrayLike = 0.0,
    ) -> Law:
        """A law from plain numbers or sequences."""
        values = (np.asarray(value, dtype=np.float64) for value in (E, A, B, alpha, beta, G))
        return cls(*np.broadcast_arrays(*values))

    def loss(self, n: ArrayLike, d: ArrayLike, period: ArrayLike = 1.0) -> Array:
        """Nats per token at `n` parameters, `d` tokens and a period; the shapes are broadcast."""
        # In logarithms: A of a steep law overflows before A / N^alpha does.
        log_n, log_d = np.log(np.asarray(n, np.float64)), np.log(np.asarray(d, np.float64))
        with np.errstate(divide="ignore"):
            first = np.exp(np.log(self.A) - self.alpha * log_n)
            second = np.exp(np.log(self.B) - self.beta * log_d)
        return np.asarray(self.E + first + second + self.period_cost(period))

    def period_cost(self, period: ArrayLike) -> Array:
        """Nats per token that levels of this period cost beside those of period 1."""
        return np.asarray(self.G * np.log2(np.asarray(period, np.float64)))

    @property
    def exponents(self) -> tuple[Array, Array]:
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b: beta / (alpha + beta), alpha / (alpha + beta)."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    def optimum(
        self, flops: ArrayLike, per_pair: float = FLOPS_PER_PARAMETER_TOKEN
    ) -> tuple[Array, Array, Array]:
        """The N and D of least loss with k N D = `flops`, and that loss, at period 1.

        N = R (C / k)^a and D = (C / k)^b / R with R = (alpha A / (beta B))^(1 / (alpha + beta)).

        Args:
            flops: C, broadcast with the law.
            per_pair: k, FLOPs a parameter and token.

        Returns:
            Parameters, tokens, and nats per token, of the broadcast shape.
        """
        a, b = self.exponents
        log_pairs = np.log(np.asarray(flops, np.float64) / per_pair)
        log_r = self._log_r()
        n, d = np.exp(a * log_pairs + log_r), np.exp(b * log_pairs - log_r)
        return n, d, self.loss(n, d)

    def compute_at(self, loss: ArrayLike, per_pair: float = FLOPS_PER_PARAMETER_TOKEN) -> Array:
        """FLOPs of the cheapest run of period 1 that reaches `loss`; infinite at or under E.

        On the frontier L - E = K (C / k)^-g, with g = alpha beta / (alpha + beta) and
        K = A R^-alpha + B R^beta, which is inverted.
        """
        log_r = self._log_r()
        g = self.alpha * self.beta / (self.alpha + self.beta)
        log_k = np.logaddexp(
            np.log(self.A) - self.alpha * log_r, np.log(self.B) + self.beta * log_r
        )
        above = np.asarray(loss, np.float64) - self.E
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            flops = per_pair * np.exp((log_k - np.log(above)) / g)
        return np.where(above > 0, flops, np.inf)

    def take(self, index: int | Array) -> Law:
        """The law of one resample, or of several."""
        return Law(*(getattr(self, field.name)[index] for field in fields(self)))

    def column(self) -> Law:
        """The same laws with a last axis of 1, to be broadcast with a row of budgets."""
        return Law(*(getattr(self, field.name)[..., None] for field in fields(self)))

    def _log_r(self) -> Array:
        ratio = np.log(self.alpha) + np.log(self.A) - np.log(self.beta) - np.log(self.B)
        return np.asarray(ratio / (self.alpha + self.beta))

"""AdamW on the host by DeepSpeed's `cpu_adam`, for `update: cpu` (docs/concepts/tiers.md).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    theta <- (1 - lr wd) theta - lr' m / (sqrt(v) + eps')
    s = sqrt(1 - b2^t)            lr' = lr s / (1 - b1^t)          eps' = eps s

That is AdamW with the bias correction folded into its arguments. The operation has one of its own,
which multiplies b^t up step by step, and takes a power after a restart: a run that resumes would
not make the bits of one that goes on. So that is off, and of the weight decay the operation gets
wd lr / lr', as it multiplies by its own rate.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nlscale.ops import compiled

_NUMBERS = itertools.count()
"""Of the operation's optimizers in this process."""


@dataclass(frozen=True)
class Folded:
    """Arguments of the operation."""

    rate: float
    eps: float
    decay: float


def folded(group: Mapping[str, Any], count: float) -> Folded:
    """Arguments by which an update without bias correction is one with it.

    Args:
        group: of AdamW: lr, betas, eps, weight_decay.
        count: of updates, this one included; with `betas_by_period` it need not be whole.
    """
    beta1, beta2 = group["betas"]
    root, first = math.sqrt(1 - beta2**count), 1 - beta1**count
    return Folded(
        rate=group["lr"] * root / first,
        eps=group["eps"] * root,
        decay=group["weight_decay"] * first / root,
    )


class CpuAdam:
    """The operation, in a process.

    Raises:
        UserError: it is not compiled (`nlscale.ops.compiled.check`).
    """

    def __init__(self) -> None:
        self._op, self._number = compiled.load("cpu_adam"), next(_NUMBERS)
        # Each update says its own numbers; what is said here is for none.
        self._op.create_adam(self._number, 0.0, 0.0, 0.0, 0.0, 0.0, True, False)
        weakref.finalize(self, self._op.destroy_adam, self._number).atexit = False

    def update(
        self,
        group: Mapping[str, Any],
        count: float,
        weights: Tensor,
        gradient: Tensor,
        kept: Mapping[str, Tensor],
    ) -> None:
        """Update a range in place.

        Args:
            group: see `folded`.
            count: see `folded`.
            weights: fp32 [length], contiguous, on the CPU, as all that follows.
            gradient: of the same length.
            kept: exp_avg and exp_avg_sq, likewise.
        """
        own, (beta1, beta2) = folded(group, count), group["betas"]
        numbers = (own.rate, beta1, beta2, own.eps, own.decay)
        state = kept["exp_avg"], kept["exp_avg_sq"]
        # the count matters to the operation's own bias correction alone, which is off
        self._op.adam_update(self._number, 1, *numbers, False, weights, gradient, *state)

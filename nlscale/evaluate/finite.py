"""Logits that are none: a model that has diverged has no score."""

from __future__ import annotations

from torch import Tensor

from nlscale.errors import UserError


def finite(logits: Tensor) -> Tensor:
    """The logits, or what sums of them came to, as they are: of any shape.

    Raises:
        UserError: some are infinite or no number.
    """
    if not logits.isfinite().all():
        raise UserError(
            "the model gives logits that are not finite: its training has diverged, or its weights "
            "are damaged; `nlscale checkpoint verify` tells, and an older checkpoint may do"
        )
    return logits

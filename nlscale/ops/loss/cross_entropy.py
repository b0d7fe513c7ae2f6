"""Cross entropy where a rank holds a part of the vocabulary, without a copy of the logits in fp32.

What a rank computes by itself; how the parts are put together is in `nlscale.model.loss`. The loss
of a token is  log sum_j exp(x_j) - x_target, and its derivative by x_j  p_j - [j = target], with
p_j = exp(x_j - log sum); with a z-loss, z (log sum)^2 beside it, that is p_j (1 + 2 z log sum) -
[j = target]. The forward pass reads the logits once and the backward pass writes their
derivative over them, so that bf16 logits cost two bytes each and nothing beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from nlscale.ops.pointwise import wide

_BLOCK = 2**22
"""Logits that the torch form holds in fp32 at a time."""


def supports(logits: Tensor) -> bool:
    """Whether the kernels take these logits; where they do not, the torch form does."""
    taken = logits.dtype in (torch.bfloat16, torch.float32) and logits.is_contiguous()
    return logits.is_cuda and taken and find_spec("triton") is not None


def row_statistics(
    logits: Tensor, targets: Tensor, kernels: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss of each row is made of.

    Args:
        logits: [rows, columns].
        targets: column of each row's target, int64 [rows]; outside of the columns where another
            rank holds it.
        kernels: whether the kernels for GPUs may be used.

    Returns:
        The largest logit m of each row, sum_j exp(x_j - m), and the target's logit or 0; in at
        least fp32. Where all are -inf, the sum is 0; a NaN or +inf among them makes it NaN.
    """
    if kernels and supports(logits):
        from nlscale.ops.loss.kernel import row_statistics as fused

        return fused(logits, targets)
    largest, total, at_target = (
        logits.new_empty(len(logits), dtype=wide(logits)) for _ in range(3)
    )
    for rows in _blocks(logits):
        block = logits[rows].to(wide(logits))
        largest[rows] = block.amax(-1)
        here, column = _here(targets[rows], block.shape[1])
        at_target[rows] = torch.where(here, block.gather(1, column[:, None])[:, 0], 0)
        total[rows] = (block - base(largest[rows, None])).exp_().sum(-1)
    return largest, total, at_target


def to_gradient_(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    d_loss: Tensor,
    z_loss: float = 0.0,
    kernels: bool = True,
) -> None:
    """Write the derivative by the logits over them.

    Args:
        logits, targets: as of `row_statistics`.
        log_sum: log sum_j exp(x_j) over the whole vocabulary, [rows].
        d_loss: derivative by the loss of each row, [rows].
        z_loss: weight of log_sum^2 in what is differentiated.
        kernels: whether the kernels for GPUs may be used.
    """
    if kernels and supports(logits):
        from nlscale.ops.loss.kernel import to_gradient_ as fused

        fused(logits, targets, log_sum, d_loss, z_loss)
        return
    for rows in _blocks(logits):
        share = (logits[rows].to(wide(logits)) - log_sum[rows, None]).exp_()
        if z_loss:
            share *= 1 + 2 * z_loss * log_sum[rows, None]
        here, column = _here(targets[rows], share.shape[1])
        share.scatter_add_(1, column[:, None], -here[:, None].to(share.dtype))
        logits[rows] = share.mul_(d_loss[rows, None]).to(logits.dtype)


def base(largest: Tensor) -> Tensor:
    """What to take from logits before exp: their largest, or 0 where all of them are -inf, which
    is no number to take from -inf."""
    return largest.masked_fill(largest == float("-inf"), 0.0)


def _here(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets are among the columns, and a column for each."""
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        yield slice(first, first + step)

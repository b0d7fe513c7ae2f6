"""The loss of each token, from logits that stay split over the vocabulary.

What else is split is in docs/concepts/layouts.md.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.loss.cross_entropy import base, row_statistics, to_gradient_


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    z_loss: float = 0.0,
    kernels: bool = True,
) -> Tensor:
    """Nats per token; what the logits held is lost in the backward pass.

    The derivative is that of nats + z_loss * (log sum_j exp(logit_j))^2, the value nats alone.

    Args:
        logits: this rank's part of the vocabulary, in the order of the ranks,
            [sequence, batch, vocabulary / ranks].
        targets: token ids, int64 [sequence, batch].
        group: the ranks that share the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        kernels: whether the kernels for GPUs may be used.

    Returns:
        [sequence, batch], in at least fp32, the same on all ranks of the group.
    """
    return _CrossEntropy.apply(logits, targets, group, z_loss, kernels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        z_loss: float,
        kernels: bool,
    ) -> Tensor:
        flat = logits.view(-1, logits.shape[-1])
        local = targets.flatten() - group.rank() * flat.shape[1]
        largest, total, at_target = row_statistics(flat, local, kernels)
        if group.size() > 1:
            largest, total, at_target = _of_all(torch.stack([largest, total, at_target]), group)
        log_sum = largest + total.log()
        ctx.save_for_backward(logits, local, log_sum)
        ctx.z_loss, ctx.kernels = z_loss, kernels
        return (log_sum - at_target).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, log_sum = ctx.saved_tensors
        flat = logits.view(-1, logits.shape[-1])
        to_gradient_(flat, local, log_sum, d_loss.flatten(), ctx.z_loss, ctx.kernels)
        return logits, None, None, None, None


def _of_all(own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """What `row_statistics` says of all columns, from what it says of this rank's, [3, rows].

    Every rank adds up the same numbers in the order of the ranks: all have the same bits.
    """
    parts = own.new_empty(group.size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(parts, own, group=group)
    largest, totals, at_target = parts.view(-1, *own.shape).unbind(1)
    most = largest.amax(0)
    totals = totals * torch.exp(largest - base(most))
    return most, reduce(torch.add, totals), reduce(torch.add, at_target)

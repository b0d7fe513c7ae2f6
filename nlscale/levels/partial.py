"""Gradients of which tensor-parallel ranks see parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from nlscale.parallel.layout import Layout


def sum_partial_gradients(partial: Sequence[Any], layout: Layout) -> None:
    """Sum over the tensor-parallel group the gradients of parameters of which its ranks see parts.

    Of the buffers that the reduction inside the node has gone over: it changes other elements of
    them on other data-parallel ranks, but the same ones on all ranks of a tensor group.
    """
    if not partial:
        return
    gradients = [p.main_grad for p in partial]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=layout.tensor_group)
    sums = flat.split([g.numel() for g in gradients])
    for gradient, summed in zip(gradients, sums, strict=True):
        gradient.copy_(summed.view_as(gradient))

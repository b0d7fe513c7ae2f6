"""Are the replicas still the same? Parameters and optimizer state, compared by checksum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nlscale.cluster.spread import COMPARED_AT_ONCE
from nlscale.parallel.layout import Layout

_WORDS_AT_ONCE = COMPARED_AT_ONCE // 8


def first_difference(
    layout: Layout, state: dict[str, Tensor], group: dist.ProcessGroup
) -> str | None:
    """The first of the named tensors that is not bit-identical on all ranks of a group.

    Args:
        layout: this rank's place.
        state: tensors by name; the same names in the same order on every rank of the group.
        group: ranks that must hold the same.

    Returns:
        The name, or None; the same answer on every rank of the group.
    """
    sums = torch.stack([checksum(x, layout.device) for x in state.values()])
    lowest, highest = sums.clone(), sums
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differing = (lowest != highest).nonzero()
    return list(state)[int(differing[0])] if len(differing) else None


def checksum(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """An int64 that changes with any bit and with the order of the elements.

    In pieces, so that what it takes in passing does not grow with the tensor.

    Args:
        tensor: anywhere.
        device: where it is computed; None: where the tensor is.
    """
    device = tensor.device if device is None else device
    size = tensor.element_size()
    words = tensor.detach().contiguous().view(-1).view({2: torch.int16, 4: torch.int32}[size])
    total = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        piece = words[start : start + _WORDS_AT_ONCE].to(device)
        # odd weights: a change of any one word changes the sum modulo 2^64
        first, last = 2 * start + 1, 2 * (start + piece.numel())
        total += torch.arange(first, last, 2, device=device).mul_(piece).sum()
    return total


def data_parallel_group() -> dist.ProcessGroup:
    """All ranks that hold the same part of the model."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)

"""Norms by level, over all ranks that hold a part: of window gradients, and of what has moved."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.spectrum import SyncGroup
from nlscale.levels.window import sum_of_squares
from nlscale.parallel.layout import Layout


def window_norms(
    due: list[GroupOptimizer], tokens: dict[SyncGroup, Tensor], levels: int, layout: Layout
) -> Tensor:
    """Norm of the mean window gradient of what updates now, per level, float64 [levels].

    The buffers hold sums, over that many tokens; what holds none does not count.
    """
    squares = torch.zeros(levels, dtype=torch.float64, device=layout.device)
    for g in due:
        square = g.window.square()
        if layout.tensor_rank > 0:
            # what every tensor-parallel rank holds counts once, on the first of them
            shared = [p.grad for p in main_parameters(g) if not p.tensor_model_parallel]
            square -= sum(sum_of_squares(grad) for grad in shared)
        count = tokens[g.group]
        squares[g.group.level] += torch.where(count > 0, square / count.square(), 0.0)
    dist.all_reduce(squares, group=layout.replica)
    return squares.sqrt()


def moved_norms(
    due: list[GroupOptimizer], before: list[list[Tensor]], levels: int, layout: Layout
) -> Tensor:
    """|update| and |weights| of what has just updated, per level, float64 [2, levels].

    A reduction over the replica: every rank of it takes part, whether or not it holds a part
    of what has updated.
    """
    squares = torch.zeros(2, levels, dtype=torch.float64, device=layout.device)
    for g, old in zip(due, before, strict=True):
        squares[1, g.group.level] += _square(old, g, layout)
        if old:
            torch._foreach_sub_(old, main_parameters(g))
        squares[0, g.group.level] += _square(old, g, layout)
    dist.all_reduce(squares, group=layout.replica)
    return squares.sqrt()


def _square(tensors: list[Tensor], g: GroupOptimizer, layout: Layout) -> Tensor | float:
    """Sum of squares of one tensor a parameter shard, those on every tensor rank once."""
    counted = [
        tensor
        for tensor, p in zip(tensors, main_parameters(g), strict=True)
        if p.tensor_model_parallel or layout.tensor_rank == 0
    ]
    return torch.stack(torch._foreach_norm(counted)).square().sum() if counted else 0.0

"""Norms of what updates at a step, by level: of window gradients, updates and weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.vocabulary import ClipScope, Config, OptimizerConfig
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.progress import Counted
from nlscale.levels.spectrum import Level, SyncGroup
from nlscale.levels.window import sum_of_squares
from nlscale.parallel.layout import Layout


class Norms:
    """Of the parameters of a copy of the optimizer state: of local levels, those of a node.

    Args:
        config: of the run.
        levels: its spectrum.
        rules: the `optimizer` section of each.
        layout: this rank's place.
    """

    def __init__(
        self, config: Config, levels: list[Level], rules: list[OptimizerConfig], layout: Layout
    ) -> None:
        self._rules, self._layout, self._count = rules, layout, len(levels)
        self._joint = config.optimizer.clip_scope == ClipScope.joint
        local = torch.tensor([level.local for level in levels], device=layout.device)
        self._together = [local == level.local for level in levels]
        """Of each level, those that a joint norm of it is over: local ones have norms of their own
        on each node, which must not reach what all nodes share."""

    def of_windows(self, due: list[GroupOptimizer], counted: Mapping[SyncGroup, Counted]) -> Tensor:
        """Norm of the mean window gradient of what updates now, per level, float64.

        The buffers hold sums, over that many targets; what holds none does not count.
        """
        squares = torch.zeros(self._count, dtype=torch.float64, device=self._layout.device)
        for g in due:
            square = g.window.square()
            if self._layout.tensor_rank > 0:
                # what every tensor-parallel rank holds counts once, on the first of them
                shared = [
                    g.optimizer.gradient(p)
                    for p in main_parameters(g)
                    if not p.tensor_model_parallel
                ]
                square -= sum(sum_of_squares(grad) for grad in shared)
            count = counted[g.group].here
            squares[g.group.level] += torch.where(count > 0, square / count.square(), 0.0)
        dist.all_reduce(squares, group=self._layout.replica)
        return squares.sqrt()

    def moved(self, due: list[GroupOptimizer], before: list[list[Tensor]]) -> Tensor:
        """|update| and |weights| of what has just updated, per level, float64 [2, levels].

        A reduction over the replica: every rank of it takes part, whether or not it holds a part
        of what has updated.
        """
        squares = torch.zeros(2, self._count, dtype=torch.float64, device=self._layout.device)
        for g, old in zip(due, before, strict=True):
            if (tier := g.optimizer.tier) is not None:
                squares[:, g.group.level] += tier.moved
                continue
            squares[1, g.group.level] += self._square(old, g)
            if old:
                torch._foreach_sub_(old, main_parameters(g))
            squares[0, g.group.level] += self._square(old, g)
        dist.all_reduce(squares, group=self._layout.replica)
        return squares.sqrt()

    def clip_factor(self, norms: Tensor, level: int) -> Tensor:
        """By which the gradient of a level is multiplied, given what `of_windows` returns."""
        clip = self._rules[level].clip
        if clip == 0:
            return torch.ones_like(norms[level])
        norm = norms[level]
        if self._joint:
            norm = norms.where(self._together[level], 0.0).square().sum().sqrt()
        return (clip / (norm + 1e-6)).clamp(max=1.0)

    def _square(self, tensors: list[Tensor], g: GroupOptimizer) -> Tensor | float:
        """Sum of squares of one tensor a parameter shard, those on every tensor rank once."""
        counted = [
            tensor
            for tensor, p in zip(tensors, main_parameters(g), strict=True)
            if p.tensor_model_parallel or self._layout.tensor_rank == 0
        ]
        return torch.stack(torch._foreach_norm(counted)).square().sum() if counted else 0.0

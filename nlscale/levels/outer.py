"""Outer steps: a second optimizer of a level, over what several of its updates have made.

Every H updates of a sync group, with theta_old its weights after the outer step before
(docs/concepts/outer.md; Nesterov momentum as in DiLoCo, arXiv 2311.08105, Algorithm 1):

    D = theta_old - theta,  m <- mu m + D,  theta <- theta_old - eta (D + mu m)

Where the level is local, nodes have updated it each by its own gradients, and D is the mean of
theirs, weighted by the targets that each has counted since the outer step before. It crosses
between the nodes in the gradient buffers, which are free then, as gradients do. So all nodes go on
from the same bits: theta_old and m are the same on each, and theta right after an outer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlscale.levels import spectrum
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.wire import Waited, Wire
from nlscale.parallel import cpu


class Outer:
    """The outer optimizer of a sync group.

    Args:
        g: the group's window and optimizer.
        own: the numbers of its level.
    """

    def __init__(self, g: GroupOptimizer, own: spectrum.Outer) -> None:
        self.g, self._own = g, own
        self._mains: list[Tensor] = main_parameters(g)
        self._before = [p.detach().clone() for p in self._mains]
        self._momentum = [torch.zeros_like(p) for p in self._mains]
        self.before = dict(zip(self._mains, self._before, strict=True))
        """Of each fp32 shard what it was after the outer step before, once it has been updated
        since; fp32."""
        self.momentum = dict(zip(self._mains, self._momentum, strict=True))
        """m of each, fp32."""

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first update since an outer step: keep the weights that it begins with."""
        if self._mains:  # of a small group a rank may have nothing
            torch._foreach_copy_(self._before, self._mains)

    @torch.no_grad()
    def start(self, share: float | None) -> None:
        """Bring D into the gradient buffers, and let it begin to cross.

        Args:
            share: weight of this node among those that have made updates of their own, which all
                sum to 1; None: all nodes have made the same ones.
        """
        if self._mains:
            torch._foreach_copy_(self._moved, self._before)
            torch._foreach_sub_(self._moved, self._mains)
        if share is not None:
            if self._mains:
                torch._foreach_mul_(self._moved, share)
            self.g.window.cross()

    @torch.no_grad()
    def finish(self) -> None:
        """What has crossed has arrived: make the step, and bring it into the model."""
        own, moved = self._own, self._moved
        if self._mains:
            torch._foreach_mul_(self._momentum, own.momentum)
            torch._foreach_add_(self._momentum, moved)
            torch._foreach_copy_(self._mains, self._before)
            torch._foreach_add_(self._mains, moved, alpha=-own.learning_rate)
            rate = own.learning_rate * own.momentum
            torch._foreach_add_(self._mains, self._momentum, alpha=-rate)
        window = self.g.window
        window.settle(torch.ones((), dtype=torch.bool, device=window.shards[0].device))
        with cpu.cuda_by_name():
            self.g.optimizer.gather_parameters()

    @property
    def _moved(self) -> list[Tensor]:
        """Where the gradients of the shards are: views of the buffers that cross."""
        return [p.grad for p in self._mains if p.grad is not None]


def make_outer_steps(steps: Sequence[tuple[Outer, float | None]], wire: Wire) -> Waited:
    """Make the outer steps of some groups; all ranks that hold them do so together.

    Args:
        steps: each with the `share` of `Outer.start`.
        wire: between the nodes.
    """
    for outer, share in steps:
        outer.start(share)
    waited = wire.finish()
    for outer, _ in steps:
        outer.finish()
    return waited

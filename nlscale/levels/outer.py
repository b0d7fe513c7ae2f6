"""Outer steps: a second optimizer of a level, over what several of its updates have made.

Every H updates of a sync group, with theta_old its weights after the outer step before
(docs/concepts/outer.md; Nesterov momentum as in DiLoCo, arXiv 2311.08105, Algorithm 1):

    D = theta_old - theta,  m <- mu m + D,  theta <- theta_old - eta (D + mu m)

Where the level is local, nodes have updated it each by its own gradients, and D is the mean of
theirs, weighted by the targets that each has counted since the outer step before. It crosses
between the nodes in the gradient buffers, which are free then, as gradients do. So all nodes go on
from the same bits: theta_old and m are the same on each, and theta right after an outer step.

Where a run ends between two outer steps, the nodes of a local level meet all the same, so that
there is one model; but in the mean of their weights alone, theta <- theta_old - D: the momentum is
that of whole periods, and would be added in full to a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.errors import TrainingFailed
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
    def is_finite(self) -> Tensor:
        """Whether what has arrived of D is, as far as this rank has it; bool []."""
        if not self._mains:
            return torch.ones((), dtype=torch.bool, device=self.g.window.shards[0].device)
        return torch.isfinite(torch.stack(torch._foreach_norm(self._moved))).all()

    @torch.no_grad()
    def finish(self, whole: bool) -> None:
        """What has crossed has arrived, and is finite: make the step, and bring it into the model.

        Args:
            whole: false where the run ends before the step is due: it is the mean alone.
        """
        own, moved = self._own, self._moved
        if self._mains:
            torch._foreach_copy_(self._mains, self._before)
            torch._foreach_add_(self._mains, moved, alpha=-own.learning_rate if whole else -1.0)
        if self._mains and whole:
            torch._foreach_mul_(self._momentum, own.momentum)
            torch._foreach_add_(self._momentum, moved)
            rate = own.learning_rate * own.momentum
            torch._foreach_add_(self._mains, self._momentum, alpha=-rate)
        self._settle(accepted=True)
        with cpu.cuda_by_name():
            self.g.optimizer.gather_parameters()

    def refuse(self) -> None:
        """What has arrived is of no use: keep all as it was before it crossed."""
        self._settle(accepted=False)

    def _settle(self, accepted: bool) -> None:
        window = self.g.window
        window.settle(torch.tensor(accepted, device=window.shards[0].device))

    @property
    def _moved(self) -> list[Tensor]:
        """Where the gradients of the shards are: views of the buffers that cross."""
        return [p.grad for p in self._mains if p.grad is not None]


class OuterStep(NamedTuple):
    """That a sync group makes."""

    level: str
    """Its name."""
    outer: Outer | None
    """None: this rank has nothing of the group."""
    share: float | None
    """See `Outer.start`."""
    whole: bool
    """See `Outer.finish`."""


def make_outer_steps(steps: Sequence[OuterStep], wire: Wire, device: torch.device) -> Waited:
    """Make some outer steps; all ranks of the run do so together, and wait for what crosses.

    Args:
        steps: the same groups in the same order on every rank.
        wire: between the nodes.
        device: of the shards.

    Raises:
        TrainingFailed: what crosses is not finite on some rank; nothing has taken it in.
    """
    mine = [(own.outer, own) for own in steps if own.outer is not None]
    for outer, own in mine:
        outer.start(own.share)
    waited = wire.finish()
    # Ranks with other shards of a group, or other stages, see nothing of a NaN that is here.
    finite = torch.ones(len(steps), dtype=torch.int32, device=device)
    for i, own in enumerate(steps):
        if own.outer is not None:
            finite[i] = own.outer.is_finite()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if 0 in (good := finite.tolist()):
        for outer, _ in mine:
            outer.refuse()
        raise TrainingFailed(
            f"weights of level {steps[good.index(0)].level!r} are not finite on some rank before "
            f"an outer step, which was not made; check the memory of its GPUs, or lower the "
            f"learning rate, and go on from the last checkpoint"
        )
    for outer, own in mine:
        outer.finish(own.whole)
    return waited

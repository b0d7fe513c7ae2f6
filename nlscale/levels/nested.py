"""Copies of an MLP that change more slowly: the nested form of CMS (Eq. 72-73), first order.

With theta the MLP of a block, which alone is trained by gradients, and phi_2 .. phi_k the copies
that slower levels hold, each of period C_l, a multiple of the next faster one's, at the end of
phi_l's window (docs/concepts/cms.md):

    phi_l <- phi_l + eta_l (phi_{l-1} - phi_l),    phi_1 = theta

and then every faster copy, and theta, is set to it; what the optimizer keeps of theta goes on. So a
slower level holds the state that the next faster one begins its window with. One copy is Lookahead
(Zhang et al. 2019, arXiv 1907.08610), and an outer step without momentum.

Copies are functions of what the nodes share: nothing of them crosses, and each rank keeps those of
the shards that it updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nlscale.config.vocabulary import Config
from nlscale.levels.optimizers import GroupOptimizer
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.model.decoder import depth_of

_OF_MLPS = ".cms.mlps."
"""In the names of their parameters."""


class Copies:
    """Those of the MLPs of a sync group.

    Args:
        g: the group's window and optimizer.
        mlps: parameters of the group that are copied.
        slower: the levels that hold copies, fastest first, and of each the sync group that has
            those of these MLPs.
    """

    def __init__(
        self, g: GroupOptimizer, mlps: set[Any], slower: Sequence[tuple[Level, SyncGroup]]
    ) -> None:
        self.g = g
        self.groups = [group for _, group in slower]
        self._trained: list[Tensor] = [main for p, _, main in g.optimizer.held() if p in mlps]
        self._held = [[p.detach().clone() for p in self._trained] for _ in slower]
        """phi_2 .. phi_k, fp32."""
        of_shards = zip(self._trained, zip(*self._held, strict=True), strict=True)
        self._of = {
            main: {level.index: phi for (level, _), phi in zip(slower, held, strict=True)}
            for main, held in of_shards
        }

    def of(self, weights: Tensor) -> dict[int, Tensor]:
        """The copies of a fp32 shard, by the level that holds each; none where it is not copied."""
        return self._of.get(weights, {})

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first update of the MLPs: they are what the copies begin as."""
        for held in self._held if self._trained else ():  # a rank may have nothing of a group
            torch._foreach_copy_(held, self._trained)

    @torch.no_grad()
    def step(self, rates: Mapping[SyncGroup, float]) -> None:
        """Move the copies whose windows end, and bring what they have become into the MLPs.

        Args:
            rates: eta of each of the groups that are due, and of no other.
        """
        chain = [self._trained, *self._held]
        for i, (faster, held) in enumerate(pairwise(chain)):
            if self.groups[i] not in rates or not self._trained:
                continue
            # phi_l - phi_{l-1} is made where phi_{l-1} was, which is set anew in any case
            torch._foreach_neg_(faster)
            torch._foreach_add_(faster, held)
            torch._foreach_add_(held, faster, alpha=-rates[self.groups[i]])
            for each in chain[: i + 1]:
                torch._foreach_copy_(each, held)


def copies_of(
    config: Config,
    levels: Sequence[Level],
    groups: Sequence[GroupOptimizer],
    named: Mapping[SyncGroup, Mapping[str, Any]],
) -> dict[SyncGroup, Copies]:
    """The copies of those sync groups that have MLPs of which slower levels hold copies.

    Args:
        config: of the run.
        levels: its spectrum.
        groups: of this rank.
        named: their parameters, by name.
    """
    slower = [level for level in levels if level.copy is not None]
    if not slower:
        return {}
    layers, stagger, found = config.model.layers, config.levels.stagger, {}
    for g in groups:
        mlps = {name: p for name, p in named[g.group].items() if _OF_MLPS in name}
        if mlps:  # one depth stands for all: those of a group have one phase
            depth = depth_of(next(iter(mlps)), layers)
            theirs = [(level, sync_group(level, depth, layers, stagger)) for level in slower]
            found[g.group] = Copies(g, {*mlps.values()}, theirs)
    return found

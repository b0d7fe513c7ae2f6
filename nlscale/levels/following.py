"""What follows the updates of a step: outer steps, and those of slow copies.

It moves the weights that the updates have made, before the model sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nlscale.cluster.life.watch import doing
from nlscale.config.vocabulary import Config
from nlscale.levels.added import Added
from nlscale.levels.nested import copies_of
from nlscale.levels.optimizers import GroupOptimizer
from nlscale.levels.outer import Outer, OuterStep, make_outer_steps
from nlscale.levels.progress import Progress
from nlscale.levels.spectrum import Level, SyncGroup
from nlscale.levels.wire import Waited, Wire
from nlscale.parallel import cpu
from nlscale.parallel.layout import Layout


class Followed(NamedTuple):
    """What has followed the updates of a step."""

    copied: dict[int, float]
    """The levels whose copies have moved, and how far."""
    crossed: set[SyncGroup]
    """The groups whose outer steps crossed between nodes."""
    waited: list[Waited]
    """For that."""


class Following:
    """What follows updates, of the sync groups of a rank's part of the model.

    Args:
        levels: the spectrum.
        groups: of this rank.
        named: their parameters, by name.
        progress: of all groups of the model, the same on every rank.
        config: of the run.
        added: what hooks add to it: levels that stand still.
        wire: between the nodes.
        layout: this rank's place.
    """

    def __init__(
        self,
        levels: list[Level],
        groups: Sequence[GroupOptimizer],
        named: Mapping[SyncGroup, Mapping[str, Any]],
        progress: Mapping[SyncGroup, Progress],
        config: Config,
        added: Added,
        wire: Wire,
        layout: Layout,
    ) -> None:
        self._levels, self._progress, self._steps = levels, progress, config.train.steps
        self._added, self._wire, self._layout = added, wire, layout
        self.outers = {
            g.group: Outer(g, own)
            for g in groups
            if (own := levels[g.group.level].outer) is not None
        }
        """Of the groups that have one, the outer optimizer."""
        self.copies = copies_of(config, levels, groups, named)
        """Of the groups that have MLPs of which slower levels hold copies."""

    def brings(self, step: int) -> set[SyncGroup]:
        """The groups of this rank whose updates at a step reach the model by what follows them."""
        copied = {g for g, own in self.copies.items() if any(c.due(step) for c in own.groups)}
        return copied.union(self._outer_due(step))

    def begin(self, group: SyncGroup) -> None:
        """Before an update of a group: keep the weights from which others go on."""
        if group in self.outers and not self._progress[group].outer_updates:
            self.outers[group].begin()
        if group in self.copies and not self._progress[group].updates:
            self.copies[group].begin()

    def make(self, step: int) -> Followed:
        """Make what follows, once the groups have made their updates."""
        crossed, waited = self._make_outer_steps(step)
        return Followed(self._move_copies(step), crossed, waited)

    @torch.no_grad()
    def _move_copies(self, step: int) -> dict[int, float]:
        """Move the copies whose windows end with a step, and hold targets that count: in others
        what they are copies of has made no update.

        The end of a run ends none: what it has trained is the MLPs as they are then.
        """
        rates = {}
        for group, progress in self._progress.items():
            copy = self._levels[group.level].copy
            if copy is None or not group.due(step):
                continue
            if progress.close(outer=False):
                rates[group] = copy.rate * self._added.factor(group.level)
            progress.noise.clear()
        for copies in self.copies.values():
            if not rates.keys().isdisjoint(copies.groups):
                copies.step(rates)
                with cpu.cuda_by_name():
                    copies.g.optimizer.gather_parameters()
        return {group.level: rate for group, rate in rates.items()}

    def _make_outer_steps(self, step: int) -> tuple[set[SyncGroup], list[Waited]]:
        """Make the outer steps that are due, of groups that have been updated since their last."""
        found = self._outer_due(step).items()
        due = {group: whole for group, whole in found if self._progress[group].outer_updates}
        steps, waited = [], []
        for group, whole in due.items():
            share = self._progress[group].outer_share(self._layout.node_rank)
            name, outer = self._levels[group.level].name, self.outers.get(group)
            steps.append(OuterStep(name, outer, share, whole))
        if steps:
            with doing("outer steps across nodes"):
                waited.append(make_outer_steps(steps, self._wire, self._layout.device))
        crossed = set()
        for group in due:
            self._progress[group].step_outer()
            if self._levels[group.level].local:
                self._progress[group].reductions += 1
                crossed.add(group)
        return crossed, waited

    def _outer_due(self, step: int) -> dict[SyncGroup, bool]:
        """The groups whose outer step follows their update at a step, true; and, with the last, all
        other local ones, false: their nodes are to meet."""
        last, levels = step == self._steps, self._levels
        due = {g: g.outer_due(step, levels[g.level].outer) for g in self._progress}
        return {g: own for g, own in due.items() if own or (last and levels[g.level].local)}

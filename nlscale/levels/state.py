"""What a rank holds of each parameter's optimizer state, by the parameter's name.

megatron-core's DistributedOptimizer gives each data-parallel rank of a node a range of every
gradient bucket, whatever parameters lie in it: of a parameter a rank holds nothing, all, or a range
of its flattened local part. With `parallel.shard_optimizer` all or matrices what is
updated is a part of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlscale.errors import TrainingFailed
from nlscale.levels.engine import LevelOptimizer
from nlscale.levels.optimizers import GroupOptimizer
from nlscale.levels.outer import Outer
from nlscale.levels.spectrum import SyncGroup
from nlscale.optim.table import rule


@dataclass(frozen=True)
class Shard:
    """A range of a parameter's flattened local part, with the state that updates it."""

    name: str
    parameter: Any
    group: SyncGroup
    start: int
    """Where the range begins in the local part."""
    weights: Tensor
    """fp32 [length]: what the optimizer updates."""
    inner: torch.optim.Optimizer
    kept: tuple[str, ...]
    """What the rule keeps of each parameter (`nlscale.optim.table.Rule.state`)."""
    local: bool = False
    """Whether each node has weights and state of its own."""
    outer: Outer | None = None
    """What makes the outer steps of the group; None: nothing."""
    copies: dict[int, Tensor] = field(default_factory=dict)
    """Those that slower levels hold, fp32 [length], by their level; none before the first
    update."""

    def state(self) -> dict[str, Tensor]:
        """What the rule keeps, fp32 [length] each: Adam's moments; none before the first update.

        Raises:
            TrainingFailed: it keeps something else than the table says, which would be lost.
        """
        state = self.inner.state.get(self.weights, {})
        if state and state.keys() != {"step", *self.kept}:
            raise TrainingFailed(
                f"{type(self.inner).__name__} keeps {', '.join(sorted(state))} of each parameter, "
                f"and its rule says step, {', '.join(self.kept)}: Rule.state has to name them"
            )
        return {name: state[name] for name in self.kept if name in state}

    def begin_state(self, updates: int) -> dict[str, Tensor]:
        """The same, of zeros, after that many updates, to be filled."""
        state = self.inner.state[self.weights]
        if state:  # what lies in host memory does from the beginning
            state["step"].fill_(updates)
            for name in self.kept:
                state[name].zero_()
            return self.state()
        state["step"] = torch.tensor(float(updates), device=self.weights.device)
        for name in self.kept:
            state[name] = torch.zeros_like(self.weights)
        return self.state()


@dataclass(frozen=True)
class WindowShard:
    """A range of a parameter's flattened local part, with the sum of its gradients."""

    name: str
    parameter: Any
    group: SyncGroup
    start: int
    """Where the range begins in the local part."""
    window: Tensor
    """fp32 [length]: sum of the gradients of the window, on this node."""
    local: bool = False
    """Whether nodes have windows of their own, which are not added up."""


@dataclass(frozen=True)
class OwedShard:
    """A range of a parameter's flattened local part, with what crossings have left to be sent."""

    name: str
    parameter: Any
    group: SyncGroup
    start: int
    """Where the range begins in the local part."""
    owed: Tensor
    """fp32 [length]."""
    of_owner: bool
    """What this node owes of sums that it adds up (E, of its part alone), not of its own (e)."""


def shards(optimizer: LevelOptimizer, parameters: dict[str, Any]) -> list[Shard]:
    """What this rank holds of its parameters' optimizer state.

    Args:
        optimizer: of this rank's part of the model.
        parameters: that part, by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    found = []
    held: Any
    for g in optimizer.groups:
        own = rule(optimizer.rules[g.group.level].rule)
        copies, begun = optimizer.following.copies.get(g.group), optimizer.progress[g.group].updates
        for held, start, values in g.optimizer.held():
            found.append(
                Shard(
                    name=names[held],
                    parameter=held,
                    group=g.group,
                    start=start,
                    weights=values,
                    inner=g.optimizer.optimizer,
                    kept=own.of(held.matrix).state,
                    local=optimizer.is_local(g.group),
                    outer=optimizer.following.outers.get(g.group),
                    copies=copies.of(values) if begun and copies is not None else {},
                )
            )
    return found


def window_shards(optimizer: LevelOptimizer, parameters: dict[str, Any]) -> list[WindowShard]:
    """What this rank holds of its parameters' windows: on each node there are windows of all.

    Args:
        optimizer: of this rank's part of the model.
        parameters: that part, by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    return [
        WindowShard(
            name=names[parameter],
            parameter=parameter,
            group=g.group,
            start=start,
            window=g.window.sums[i][low:high],
            local=optimizer.is_local(g.group),
        )
        for g in optimizer.groups
        for i, parameter, start, low, high in _in_node(g)
    ]


def owed_shards(optimizer: LevelOptimizer, parameters: dict[str, Any]) -> list[OwedShard]:
    """What this rank's windows still owe: of its own sums, and then of those that it adds up.

    Args:
        optimizer: of this rank's part of the model.
        parameters: that part, by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    own, totals = [], []
    for g in optimizer.groups:
        owed = g.window.owed
        if owed is None:
            continue
        for i, parameter, start, low, high in _in_node(g):
            named = names[parameter], parameter, g.group
            own.append(OwedShard(*named, start, owed.errors[i][low:high], of_owner=False))
            if owed.owned is not None:
                begin, end = owed.owned[i]
                first, last = max(low, begin), min(high, end)
                if first < last:
                    values = owed.totals[i][first - begin : last - begin]
                    at = start + first - low
                    totals.append(OwedShard(*named, at, values, of_owner=True))
    return own + totals


def _in_node(g: GroupOptimizer) -> Iterator[tuple[int, Any, int, int, int]]:
    """The ranges of parameters that lie in a group's shards: which shard, the parameter, where the
    range begins in its local part, and where it begins and ends in the shard."""
    for i, place in enumerate(g.window.places):
        for parameter, ranges in g.optimizer.held_in_node(*place).items():
            local = ranges["gbuf_local"]
            yield i, parameter, ranges["param"].start, local.start, local.end

"""Whether the nodes still have the same parameters, and the same of what updates them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from nlscale.levels.following import Following
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.spectrum import SyncGroup
from nlscale.parallel.layout import Layout
from nlscale.parallel.replicas import data_parallel_group, first_difference


def parameter_difference(
    layout: Layout, parameters: Mapping[str, Any], apart: Set[str]
) -> str | None:
    """The first parameter that ranks do not share bit for bit which should.

    Groups find different things; all of them are asked, so that no rank waits for another.

    Args:
        layout: this rank's place.
        parameters: this rank's, by name.
        apart: names of those that differ between the nodes now; inside a node they do not.
    """
    named = {name: p.detach() for name, p in parameters.items()}
    whole = {n: p for n, p in named.items() if not parameters[n].tensor_model_parallel}
    together = {n: p for n, p in named.items() if n not in apart}
    drifting = {n: p for n, p in named.items() if n in apart}
    compared = [
        first_difference(layout, mine, group)
        for mine, group in (
            (together, data_parallel_group()),
            (drifting, layout.within_node.dp),
            (whole, layout.tensor_group),
        )
        if mine
    ]
    return next((name for name in compared if name is not None), None)


def state_difference(
    layout: Layout,
    groups: list[GroupOptimizer],
    following: Following,
    local: Set[SyncGroup],
    apart: Set[SyncGroup],
) -> str | None:
    """The first tensor of the optimizers that nodes do not share bit for bit which should.

    Args:
        layout: this rank's place.
        groups: of this rank.
        following: what follows their updates.
        local: groups whose inner state each node has for itself.
        apart: those of them whose weights, too, differ now; the weights that their outer steps go
            on from do not.
    """
    if layout.across_nodes is None:
        return None
    state: dict[str, Tensor] = {}
    for g in groups:
        group, outer = g.group, following.outers.get(g.group)
        g.optimizer.settle()
        of = f"level {group.level} phase {group.phase}"
        if group.outer_phase:  # of one phase there are then several groups
            of = f"{of} outer phase {group.outer_phase}"
        for i, p in enumerate(main_parameters(g)):
            found = {} if group in local else dict(g.optimizer.optimizer.state[p])
            if group not in apart:
                found["weights"] = p
            if outer is not None:
                found["outer momentum"] = outer.momentum[p]
                if group in apart:
                    found["outer weights"] = outer.before[p]
            if (copies := following.copies.get(group)) is not None:
                found |= {f"copy at level {level}": x for level, x in copies.of(p).items()}
            for key, value in found.items():
                if value.dim() > 0:  # the step count of a shard is a scalar, equal by construction
                    state[f"{key} of the optimizer, {of}, shard {i}"] = value
    return first_difference(layout, state, layout.across_nodes) if state else None

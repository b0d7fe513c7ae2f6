"""Which node updates which parameter, where each matrix is to lie whole on one node.

With `parallel.shard_optimizer=matrices` the gradient of a matrix is summed on the node that updates
it, so that no matrix has to be joined over the network; what is no matrix is cut evenly, as with
`all`. A parameter of several matrices, sections or heads, lies on one node with all of them. Which
that is follows from the sizes alone: the largest first, to the node that has least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nlscale.config.vocabulary import Config, OptimizerConfig, Sharding
from nlscale.levels.spectrum import SyncGroup
from nlscale.optim.table import rule

Homes = Mapping[Any, int]
"""Of each parameter that lies whole on one node, which."""
Cut = list[list[slice]]
"""Of a flat shard, what each node has of it."""


def homes(
    config: Config,
    rules: list[OptimizerConfig],
    groups: Mapping[SyncGroup, Mapping[str, Any]],
    nodes: int,
) -> Homes | None:
    """Where the matrices of a stage lie; None where they are cut like everything else.

    Args:
        config: of the run.
        rules: the `optimizer` section of each level.
        groups: parameters by sync group, this tensor rank's parts; all ranks of a stage have them
            in the same order and of the same sizes.
        nodes: over which state is spread.
    """
    if config.parallel.shard_optimizer != Sharding.matrices:
        return None
    matrices = [
        parameter
        for group, parameters in groups.items()
        for parameter in parameters.values()
        if parameter.matrix and rule(rules[group.level].rule).whole_matrices
    ]
    found, loads = {}, [0] * nodes
    for parameter in sorted(matrices, key=lambda p: -p.numel()):  # stable: ties as they come
        found[parameter] = loads.index(min(loads))
        loads[found[parameter]] += parameter.numel()
    return found


def even_cut(size: int, nodes: int, begin: int = 0) -> Cut:
    """Equal parts of so many elements; the last has what is over."""
    part = size // nodes
    ends = [*(begin + part * node for node in range(nodes)), begin + size]
    return [[slice(ends[node], ends[node + 1])] for node in range(nodes)]


def cut_at_homes(
    places: Iterable[tuple[int, int, int | None]], begin: int, end: int, nodes: int
) -> Cut:
    """What each node has of a shard: matrices at their homes, runs of all else in equal parts.

    A node has no more than one range of a parameter.

    Args:
        places: of the parameters of a bucket in the order in which they lie: where each begins and
            ends, and its home or None.
        begin: of the shard, counted as they are.
        end: of it; between parameters, and after the last, there may be nothing of use.
        nodes: that share it.
    """
    found: Cut = [[] for _ in range(nodes)]
    rest = begin

    def deal(until: int) -> None:
        if rest < until:
            for mine, more in zip(found, even_cut(until - rest, nodes, rest - begin), strict=True):
                mine += [each for each in more if each.start < each.stop]

    for first, last, home in places:
        low, high = max(first, begin), min(last, end)
        if home is None or low >= high:
            continue
        deal(low)
        found[home].append(slice(low - begin, high - begin))
        rest = high
    deal(end)
    return found

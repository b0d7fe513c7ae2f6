"""Windows, and what they owe, in a form that does not depend on the nodes.

A checkpoint holds the sum over all nodes of each. The run that goes on takes that form as well: of
a window the first node has the sum and the others zeros, or, where all that is in it has crossed,
each has the sum; of what is owed every node has an equal part (docs/concepts/windows.md). What all
nodes have together stays the same, up to rounding.
"""

from __future__ import annotations

from nlscale.config.vocabulary import Reduction
from nlscale.levels.engine import LevelOptimizer
from nlscale.levels.feedback import Owed
from nlscale.levels.window import Window


def sum_windows(optimizer: LevelOptimizer) -> None:
    """Let every node hold the sums over all nodes, to be saved. `keep_sums_once` is to follow.

    It costs one reduction across nodes, in fp32, of pending windows and of what is owed.
    """
    owed = _owed(optimizer)
    for each in owed:
        each.gather()
    for window in _in_parts(optimizer):
        window.forget_of_others()
    pending = _pending(optimizer) + _in_parts(optimizer)
    sums = [s for window in pending for s in window.sums]
    optimizer.wire.sum(sums + [error for each in owed for error in each.errors])


def keep_sums_once(optimizer: LevelOptimizer) -> None:
    """Of sums that every node holds, leave each node its share."""
    if optimizer.layout.node_rank > 0:
        for window in _pending(optimizer):
            for tensor in window.sums:
                tensor.zero_()
    for each in _owed(optimizer):
        each.share(optimizer.layout.nodes)


def _pending(optimizer: LevelOptimizer) -> list[Window]:
    """Windows that hold something, of which each node has its own part of one sum."""
    deferred = optimizer.config.levels.reduction == Reduction.deferred
    return _unfinished(optimizer) if deferred else []


def _in_parts(optimizer: LevelOptimizer) -> list[Window]:
    """Those of which each node has the sums that it updates parameters by, and elsewhere anything:
    they have crossed, and those sums have not come back."""
    every_step = optimizer.config.levels.reduction == Reduction.every_step
    return _unfinished(optimizer) if every_step and not optimizer.alike_on_nodes else []


def _unfinished(optimizer: LevelOptimizer) -> list[Window]:
    if optimizer.layout.nodes == 1:
        return []
    summed = (w for w in optimizer.windows if not w.local)
    return [w for w in summed if optimizer.progress[w.group].tokens]


def _owed(optimizer: LevelOptimizer) -> list[Owed]:
    return [w.owed for w in optimizer.windows if w.owed is not None]

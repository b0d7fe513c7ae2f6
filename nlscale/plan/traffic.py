"""Bytes that leave a node for the others, step by step, from the configuration alone.

Gradients cross in fp32, or as a level's `wire` says. Each data-parallel rank of a node reduces its
shard over the ranks that hold the same shard on the other nodes, so that together they send what
one ring all-reduce over the nodes would (`nlscale.levels.spectrum.reduction_bytes`). With
`parallel.shard_optimizer` all or matrices they send sums once, and the parameters that they have
updated; with all, whole matrices, where rules take such, go to their owners and back.

Ranks are numbered tensor first, then data, then pipeline. With a pipeline over several nodes a
node holds some of its ranks only, and a data-parallel group spans some of the nodes only; the
bytes are then the mean over all nodes. The largest step of one node may be larger than that of the
mean, since the blocks of a stage have phases that lie close together.

A sync group is reduced at the end of its window (docs/concepts/windows.md), one of a local level at
its outer steps (docs/concepts/outer.md); plain data parallel, or `levels.reduction=every-step`,
reduces every group at every step. The last step applies every unfinished window: that counts in
the bytes of the run, and not in those of a step. Not counted: the few numbers that all ranks agree
on after a step, and what starts and checkpoints a run; activations between pipeline ranks, which
cross besides (`activation_bytes`). Under tensor parallelism the parameters that each rank holds
whole (norms and biases, below a thousandth) cross once a tensor rank and are counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlscale.config.curriculum import largest
from nlscale.config.vocabulary import Config, Dtype, Reduction, WireFormat
from nlscale.levels.groups import group_parameters
from nlscale.levels.passes import GroupMatrices, group_matrices, matrix_crossing_bytes
from nlscale.levels.spectrum import Level, SyncGroup, gathered_bytes, reduction_bytes

_LONGEST_SERIES = 1_000_000


@dataclass(frozen=True)
class Traffic:
    """Bytes leaving one node: in the steady state, or, where a period changes, in the run."""

    bytes_per_level: NDArray[np.float64]
    """[levels, cycle]: at each step of a cycle, steps counted from 1 (mod cycle)."""
    mean_per_level: NDArray[np.float64]
    """[levels]: a step, exact for any periods."""
    run_per_level: NDArray[np.float64]
    """[levels]: all steps of the run, from its first windows to those that its end cuts short."""

    @property
    def per_step(self) -> NDArray[np.float64]:
        """[cycle]: all levels together."""
        return self.bytes_per_level.sum(axis=0)

    @property
    def mean(self) -> float:
        return float(self.mean_per_level.sum())

    @property
    def peak(self) -> float:
        return float(self.per_step.max())

    @property
    def peak_per_level(self) -> NDArray[np.float64]:
        """[levels]: the largest step of each; levels need not peak at the same step."""
        return self.bytes_per_level.max(axis=1)


def traffic(
    config: Config,
    levels: list[Level],
    vocabulary: int,
    nodes: int,
    stagger: bool | None = None,
    reduction: Reduction | None = None,
    group_nodes: int | None = None,
) -> Traffic:
    """The traffic of a configuration between nodes.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        nodes: of the run.
        stagger: null: `config.levels.stagger`.
        reduction: null: `config.levels.reduction`.
        group_nodes: nodes that a data-parallel group spans; null: all.
    """
    stagger = config.levels.stagger if stagger is None else stagger
    reduction = config.levels.reduction if reduction is None else reduction
    crossing = _crossing(config, levels, stagger, nodes, group_nodes or nodes)
    steps = series_steps(levels, [g for g, _ in crossing])
    gathered = gathered_bytes(config)
    series = np.zeros((len(levels), steps))
    means, run, last = np.zeros(len(levels)), np.zeros(len(levels)), config.train.steps
    for group, parameters in group_parameters(config, levels, vocabulary, stagger).items():
        level = levels[group.level]
        sent = node_bytes(parameters, nodes, group_nodes, level.wire, gathered)
        if reduction == Reduction.every_step and not level.local:
            series[group.level] += sent
            means[group.level] += sent
            run[group.level] += sent * last
        else:
            series[group.level, crossing_steps(level, group, steps) - 1] += sent
            means[group.level] += sent / group.mean_period / level.updates_a_crossing
            made = group.outer_steps(last, level) if level.local else group.updates(last)
            run[group.level] += sent * made
    for g, of_updates in crossing:
        add_updates(series[g.group.level], g.group, of_updates)
        means[g.group.level] += sum(of_updates) / len(of_updates) / g.group.mean_period
        turns, more = divmod(g.group.updates(last), len(of_updates))
        run[g.group.level] += turns * sum(of_updates) + sum(of_updates[:more])
    return Traffic(series, means, run)


def _crossing(
    config: Config, levels: list[Level], stagger: bool, nodes: int, group_nodes: int
) -> list[tuple[GroupMatrices, list[float]]]:
    """Bytes of whole matrices that leave a node, the mean, at each of a group's updates."""
    found = []
    for g in group_matrices(config, levels, stagger, range(config.model.layers)):
        sent = [matrix_crossing_bytes(config, values, group_nodes) for values in g.values()]
        if any(sent):
            found.append((g, [size * group_nodes / nodes for size in sent]))
    return found


def due_steps(group: SyncGroup, last: int) -> NDArray[np.int64]:
    """The first steps, from 1, at which a group is due, until one that may be the last of them."""
    ends = [*(own.begins for own in group.stretches[1:]), last]
    return np.concatenate(
        [
            np.arange(own.end_after(own.begins), min(end, last) + 1, own.period)
            for own, end in zip(group.stretches, ends, strict=True)
        ]
    )


def crossing_steps(level: Level, group: SyncGroup, last: int) -> NDArray[np.int64]:
    """The same, at which a group of a level crosses between nodes: when due, or, of a local level,
    at its outer steps."""
    every = level.updates_a_crossing
    return due_steps(group, last)[(group.outer_phase or every) - 1 :: every]


def add_updates(series: NDArray[np.float64], group: SyncGroup, of_updates: list[float]) -> None:
    """Add to each step of a series [steps] what the group's update at it comes to.

    Args:
        series: of a cycle.
        group: that updates.
        of_updates: of its updates one after the other, from the first; they repeat.
    """
    due = due_steps(group, len(series)) - 1
    series[due] += np.resize(of_updates, len(due))


def node_bytes(
    parameters: float,
    nodes: int,
    group_nodes: int | None = None,
    wire: WireFormat = WireFormat.fp32,
    gathered: int | None = None,
) -> float:
    """Bytes leaving a node, the mean over all, when these parameters of the model cross once.

    Each is reduced over the `group_nodes` nodes (null: all) that its data-parallel groups span; see
    `nlscale.levels.spectrum.reduction_bytes`.
    """
    group_nodes = group_nodes or nodes
    return reduction_bytes(parameters, group_nodes, wire, gathered) * group_nodes / nodes


def activation_bytes(config: Config, nodes: int, ranks_per_node: int) -> float:
    """Bytes of activations and their gradients leaving a node in a step, the mean over all nodes.

    Of a run in stages at the largest of them.

    Every micro batch passes from each model stage to the next and its gradient back; without
    sequence parallelism each tensor-parallel rank sends the whole residual stream to its like.
    """
    parallel, train = config.parallel, config.train
    ranks = nodes * ranks_per_node
    of_a_pipeline_rank = ranks // parallel.pipeline
    crossings = sum(
        rank // ranks_per_node != (rank + of_a_pipeline_rank) % ranks // ranks_per_node
        # the last pipeline rank sends to the first where stages are interleaved
        for rank in range(ranks)
        for _ in range(parallel.virtual_stages - (rank >= ranks - of_a_pipeline_rank))
    )
    data_parallel = of_a_pipeline_rank // parallel.tensor
    stage = largest(config)
    sequences = stage.global_batch / data_parallel
    residual = stage.sequence_length * config.model.d_model
    element = 2 if train.dtype == Dtype.bf16 else 4
    part = parallel.tensor if parallel.sequence else 1
    return 2 * crossings * sequences * residual * element / part / nodes


def cycle_steps(levels: list[Level]) -> int:
    """Steps after which the pattern of updates and crossings repeats: the longest of the levels'
    where each divides it, their periods and, of local ones, those from outer step to outer step.

    Those that hardly divide each other are cut off after about a million steps, and one that is
    longer than that within it. Where a period changes, the run's: nothing repeats.
    """
    changes = [level.changes for level in levels if level.changes is not None]
    if changes:
        return min(changes[0].steps, _LONGEST_SERIES)
    cycle = math.lcm(*(level.crosses_every for level in levels))
    longest = max(level.crosses_every for level in levels)
    if cycle <= _LONGEST_SERIES or longest > _LONGEST_SERIES:
        return min(cycle, _LONGEST_SERIES)
    return -(-_LONGEST_SERIES // longest) * longest


def series_steps(levels: list[Level], matrices: list[GroupMatrices]) -> int:
    """The same where updates of whole matrices are not all alike; not cut off: that of the periods
    where it would be longer than about a million steps."""
    cycle = cycle_steps(levels)
    if any(level.changes is not None for level in levels):
        return cycle
    turns = math.lcm(*(g.level.turns for g in matrices))
    return cycle * turns if cycle * turns <= _LONGEST_SERIES else cycle

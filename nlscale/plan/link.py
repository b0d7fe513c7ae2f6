"""How much of the link's time a step waits for: what its last backward pass does not hide.

A sync group's gradient is cut into buckets of `parallel.bucket_size` elements, from the last block
to the first, as the backward pass of the last micro batch makes it. A bucket whose blocks are done
queues for the link; what crosses when the last pipeline stage has ended its backward pass is
exposed, and so is all of it where `parallel.overlap` is false. Updated parameters and whole
matrices, which cross too with `parallel.shard_optimizer=all`, do so when nothing else goes on, as
do the outer steps of local levels.

    compute       seconds of a step: model FLOPs over the GPUs' peak at a utilisation, or as given
    a pass        (1 - bubble) / micro batches of it, the backward pass 2/3 of a pass
    a stage       ends its last backward pass one such pass later than the stage after it

A node whose gradients cross holds ranks of one pipeline rank alone (`nlscale.cluster.spread`), and
has the full rate of its links for them. Left out: latency, what the network shares with
activations, the reduction inside the node, and that a link at work slows what computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config, Dtype, Reduction
from nlscale.errors import UserError
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.passes import matrices_by_level, matrix_crossing_bytes
from nlscale.levels.spectrum import (
    Level,
    SyncGroup,
    gathered_bytes,
    reduction_bytes,
    sync_group,
)
from nlscale.model.stages import stage_blocks
from nlscale.plan.pipeline import Pipeline
from nlscale.plan.traffic import crossing_steps

_BACKWARD = 2 / 3
"""Of a forward and a backward pass."""
_BITS = 62


@dataclass(frozen=True)
class LinkTime:
    """Seconds a step, the mean of a cycle, by level.

    Of a pipeline at each step those of the rank that ends last, for which all others wait.
    """

    hidden: list[float]
    exposed: list[float]


@dataclass(frozen=True)
class _Piece:
    """A bucket of a sync group on one pipeline stage."""

    group: SyncGroup
    ready: float
    """Seconds before the stage ends its last backward pass."""
    seconds: float
    """That it occupies the link."""
    after: float
    """Seconds that matrices, updated parameters and outer steps occupy it, after the step."""


@dataclass(frozen=True)
class Links:
    """What crosses in a step, and when, for a configuration on a cluster.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        group_nodes: nodes that a data-parallel group spans.
        pipeline: how micro batches pass.
        step_seconds: that a step computes.
    """

    config: Config
    levels: list[Level]
    vocabulary: int
    cluster: Cluster
    group_nodes: int
    pipeline: Pipeline
    step_seconds: float
    _by_depth: list[list[int]] = field(init=False)
    _matrices: list[float] = field(init=False)
    """Bytes of whole matrices that leave a node, of each level in a mean block, a mean update."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_depth", parameters_by_depth(self.config, self.vocabulary))
        crossing = [
            matrix_crossing_bytes(self.config, own.passes * own.elements, self.group_nodes)
            for own in matrices_by_level(self.config)
        ]
        object.__setattr__(self, "_matrices", crossing)

    @property
    def backward_seconds(self) -> float:
        """Of one micro batch on one pipeline rank."""
        passes = (1 - self.pipeline.bubble) * self.step_seconds / self.pipeline.micro_batches
        return _BACKWARD * passes

    def time(self, reduction: Reduction, stagger: bool, steps: range) -> LinkTime:
        """Hidden and exposed, where a group crosses when due, or with every step.

        Args:
            reduction: when groups cross.
            stagger: whether blocks have phases of their own.
            steps: counted from 1, of which the mean is taken: a cycle, or those of a stage.
        """
        ranks = range(self.config.parallel.pipeline)
        stages = [list(self._pieces(rank, stagger)) for rank in ranks]
        groups = sorted({piece.group for pieces in stages for piece in pieces})
        hidden, exposed = ([0.0] * len(self.levels) for _ in range(2))
        for due, share in _together(self.levels, groups, reduction, steps):
            seen = [
                self._crossing([piece for piece in pieces if piece.group in due], rank)
                for rank, pieces in enumerate(stages)
            ]
            # All wait for the stage that ends last.
            worst_hidden, worst = max(seen, key=lambda found: sum(found[1]))
            for level in range(len(self.levels)):
                hidden[level] += worst_hidden[level] * share
                exposed[level] += worst[level] * share
        return LinkTime(hidden, exposed)

    def _crossing(self, pieces: list[_Piece], rank: int) -> tuple[list[float], list[float]]:
        """Hidden and exposed seconds of one step on one stage, by level."""
        hidden, exposed = ([0.0] * len(self.levels) for _ in range(2))
        # Time runs from the end of this stage's pass; the step's passes end so much later.
        end = rank * self.backward_seconds / self.config.parallel.virtual_stages
        free = -float("inf")
        for piece in sorted(pieces, key=lambda piece: -piece.ready):
            begins = max(free, -piece.ready) if self.config.parallel.overlap else max(free, end)
            free = begins + piece.seconds
            late = min(piece.seconds, max(0.0, free - end))
            hidden[piece.group.level] += piece.seconds - late
            exposed[piece.group.level] += late + piece.after
        return hidden, exposed

    def _pieces(self, rank: int, stagger: bool) -> Iterator[_Piece]:
        """The buckets of a pipeline rank, from the last block of each model stage to its first."""
        parallel = self.config.parallel
        mine = stage_blocks(self.config, self.vocabulary)[rank :: parallel.pipeline]
        depths = [depth for blocks in reversed(mine) for depth in reversed(blocks)]
        waiting: dict[SyncGroup, int] = {}
        whole: dict[SyncGroup, float] = {}

        def piece(group: SyncGroup, done: int) -> _Piece:
            wire, parameters = self.levels[group.level].wire, waiting.pop(group)
            gathered, nodes = gathered_bytes(self.config), self.group_nodes
            sent = reduction_bytes(parameters, nodes, wire, None if gathered is None else 0)
            after = reduction_bytes(parameters, nodes, wire, gathered) - sent + whole.pop(group)
            if self.levels[group.level].local:  # outer steps follow the updates
                sent, after = 0.0, sent + after
            ready = self.backward_seconds * (1 - done / len(depths))
            seconds = self.cluster.link_seconds
            return _Piece(group, ready, seconds(sent), seconds(after))

        for done, depth in enumerate(depths, 1):
            for level, counts in zip(self.levels, self._by_depth, strict=True):
                if not counts[depth]:
                    continue
                group = sync_group(level, depth, self.config.model.layers, stagger)
                waiting[group] = waiting.get(group, 0) + counts[depth]
                whole[group] = whole.get(group, 0.0) + self._matrices[level.index]
                if waiting[group] / parallel.tensor >= parallel.bucket_size:
                    yield piece(group, done)
        for group in list(waiting):
            yield piece(group, self._last_of(group, depths, stagger))

    def _last_of(self, group: SyncGroup, depths: list[int], stagger: bool) -> int:
        """How many blocks are done when the last of a group is."""
        level, layers = self.levels[group.level], self.config.model.layers
        return max(
            done
            for done, depth in enumerate(depths, 1)
            if self._by_depth[group.level][depth]
            and sync_group(level, depth, layers, stagger) == group
        )


def _together(
    levels: list[Level], groups: list[SyncGroup], reduction: Reduction, steps: range
) -> Iterator[tuple[set[SyncGroup], float]]:
    """The sets of groups that cross at one step, and the share of steps at which each does."""
    every_step = reduction == Reduction.every_step
    if every_step and not any(level.local for level in levels):
        yield set(groups), 1.0
        return
    words = np.zeros((len(steps), len(groups) // _BITS + 1), dtype=np.int64)
    for i, group in enumerate(groups):
        level, due = levels[group.level], np.arange(1, steps.stop)
        if level.local or not every_step:
            due = crossing_steps(level, group, steps.stop - 1)
        words[due[due >= steps.start] - steps.start, i // _BITS] |= 1 << (i % _BITS)
    for found, count in zip(*np.unique(words, axis=0, return_counts=True), strict=True):
        bits = [int(found[i // _BITS]) >> (i % _BITS) & 1 for i in range(len(groups))]
        yield {group for group, bit in zip(groups, bits, strict=True) if bit}, count / len(steps)


def compute_seconds(
    cluster: Cluster, flops_per_step: float, utilisation: float, dtype: Dtype
) -> float | None:
    """Seconds that a step computes at that share of the GPUs' peak in bf16.

    None where that is not known: in fp32, or the cluster file does not give the peak.

    Raises:
        UserError: a share that is none.
    """
    if not 0 < utilisation <= 1:
        raise UserError(
            f"--utilisation {utilisation:g}: give a share above 0 and up to 1, such as 0.4"
        )
    if cluster.gpu_tflops is None or dtype != Dtype.bf16:
        return None
    return flops_per_step / (cluster.ranks * cluster.gpu_tflops * 1e12 * utilisation)

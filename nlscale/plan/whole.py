"""What rules over whole matrices take beside the others: bytes on their way, and Newton-Schulz.

Every rank sends its ranges to the owners and what it owns back (`nlscale.levels.exchange`), in
expectation an equal part to each rank that shares the optimizer's state: those of a pipeline stage
on one node, or with `parallel.shard_optimizer=all` on all of a data-parallel group. With `matrices`
each lies on one node, and only the ranks of that have ranges of it. Which matrix is whose decides
how long a step computes: its sync groups follow each other, and each waits for the owner with most
to do. Left out: latency, the sums of squares that m3 scales by, what delta and deep compute beside
Newton-Schulz, and how fast the GPUs of a node reach each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlscale.cluster.machines import Cluster
from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import Config, Sharding
from nlscale.levels.passes import (
    GroupMatrices,
    group_matrices,
    matrices_by_level,
    matrix_crossing_bytes,
    value_bytes,
)
from nlscale.levels.spectrum import Level, mean_period
from nlscale.model.stages import stage_blocks
from nlscale.plan.link import compute_seconds
from nlscale.plan.traffic import add_updates, series_steps


@dataclass(frozen=True)
class LevelMatrixPlan:
    """A level whose rule takes whole matrices."""

    name: str
    rule: str
    matrices: int
    """Of the model."""
    parameters: int
    """In them."""


@dataclass(frozen=True)
class WholePlan:
    """A step's updates of whole matrices, as blocks are staggered."""

    levels: list[LevelMatrixPlan]
    """Those that have such a rule."""
    owners: int
    """Ranks over which the matrices of a pipeline stage are dealt."""
    in_node_bytes_per_step: float
    """That a rank sends to others of its node, the mean; of the pipeline rank that sends most."""
    in_node_peak_bytes: float
    """The same at the largest step."""
    inter_node_bytes_per_step: float
    """That leave a node, the mean over all; part of the traffic of the levels."""
    newton_schulz_flops_per_step: float
    """Of all ranks, the mean; what every node computes for itself counts as often."""
    to_model_flops: float
    """The same over the model FLOPs of a step."""
    newton_schulz_seconds_per_step: float | None
    """That a rank computes or waits for it, the mean; None: the GPUs' speed is not known."""
    newton_schulz_peak_seconds: float | None
    """The same at the largest step."""


def whole_plan(
    config: Config,
    levels: list[Level],
    vocabulary: int,
    cluster: Cluster,
    in_node: int,
    group_nodes: int,
    model_flops: float,
    utilisation: float,
) -> WholePlan | None:
    """Of a configuration on a cluster; None where no rule takes whole matrices.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        in_node: data-parallel ranks of one node.
        group_nodes: nodes that a data-parallel group spans.
        model_flops: of a step.
        utilisation: share of the GPUs' peak at which matrices are multiplied.
    """
    by_level, layers = matrices_by_level(config), config.model.layers
    taking = [level for level in levels if by_level[level.index].shapes]
    if not taking:
        return None
    spread = config.parallel.shard_optimizer != Sharding.node
    of_node = config.parallel.tensor * in_node
    owners = of_node * (group_nodes if spread else 1)
    sent, longest = _series(config, levels, vocabulary, owners)
    at_home = config.parallel.shard_optimizer == Sharding.matrices
    of_value = value_bytes(config) / owners * (of_node - 1) / (of_node if at_home else owners)
    blocks = layers * (1 if spread else group_nodes)
    every = {own.index: mean_period(own, layers, config.levels.stagger) for own in taking}
    flops = sum(blocks * by_level[own.index].flops / every[own.index] for own in taking)
    values = sum(
        layers * by_level[own.index].passes * by_level[own.index].elements / every[own.index]
        for own in taking
    )
    leaving = matrix_crossing_bytes(config, values, group_nodes) * group_nodes / cluster.nodes

    def seconds(of_a_rank: float) -> float | None:
        return compute_seconds(cluster, of_a_rank * cluster.ranks, utilisation, config.train.dtype)

    return WholePlan(
        levels=[
            LevelMatrixPlan(
                own.name,
                of_level(config, own.index).rule,
                sum(by_level[own.index].shapes.values()),
                by_level[own.index].total,
            )
            for own in taking
        ],
        owners=owners,
        in_node_bytes_per_step=of_value * float(sent.mean(axis=1).max()),
        in_node_peak_bytes=of_value * float(sent.max()),
        inter_node_bytes_per_step=leaving,
        newton_schulz_flops_per_step=flops,
        to_model_flops=flops / model_flops,
        # All pipeline ranks wait for the one that ends last.
        newton_schulz_seconds_per_step=seconds(float(longest.max(axis=0).mean())),
        newton_schulz_peak_seconds=seconds(float(longest.max())),
    )


def _series(
    config: Config, levels: list[Level], vocabulary: int, owners: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values on their way, and FLOPs of the busiest owners, [pipeline ranks, steps of a cycle]."""
    ranks, cut = config.parallel.pipeline, stage_blocks(config, vocabulary)
    of_ranks: list[list[GroupMatrices]] = [
        group_matrices(
            config,
            levels,
            config.levels.stagger,
            [d for blocks in cut[rank::ranks] for d in blocks],
        )
        for rank in range(ranks)
    ]
    steps = series_steps(levels, [g for groups in of_ranks for g in groups])
    sent, longest = np.zeros((ranks, steps)), np.zeros((ranks, steps))
    for rank, groups in enumerate(of_ranks):
        for g in groups:
            add_updates(sent[rank], g.group, [float(values) for values in g.values()])
            add_updates(longest[rank], g.group, g.longest(owners))
    return sent, longest

"""What levels of `memory: host` take of a node's memory, free on a GPU, and wait for.

    host      4 bytes a parameter, the fp32 weights, and what the rule keeps; sharded as elsewhere
    freed     the same on the GPU, in fp32 without the weights, which are the model's own there
    streamed  the host's bytes at each update, in and out

An update takes what comes in at the rate of `pcie_gbyte` of the cluster file. While it comes in,
the way back is free for what is done with, and what is left of that goes back while the next step
computes; so a step waits for one way (`nlscale.levels.tiers`). Nothing is read ahead: what comes in
is not hidden by the steps of a period in which a level is idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config, Dtype, Sharding
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.kept import kept_by_depth
from nlscale.levels.ring_pieces import on_host, ring_bytes
from nlscale.levels.spectrum import Level, sync_group
from nlscale.model.stages import stage_blocks
from nlscale.plan.traffic import add_updates, cycle_steps

WEIGHT_BYTES = 4
"""Of a parameter's fp32 weight."""


@dataclass(frozen=True)
class HostLevel:
    """A level whose state lies in host memory."""

    name: str
    host_bytes: float
    """Of all GPUs together."""


@dataclass(frozen=True)
class HostPlan:
    """What is streamed, of the pipeline rank that has most of it."""

    levels: list[HostLevel]
    gpu_bytes: float
    """In host memory, of one GPU."""
    node_bytes: float
    """The same of a node, the mean over nodes."""
    freed_bytes: float
    """On that GPU, the ring not counted."""
    ring_bytes: float
    """On each GPU."""
    streamed_bytes_per_step: float
    """Of a GPU, in and out together, the mean of a cycle."""
    streamed_peak_bytes: float
    """The same at the largest step."""
    waited_seconds_per_step: float
    """For what comes in, the mean."""
    waited_peak_seconds: float
    """At the largest step."""


def moved_bytes(config: Config, held: list[float], kept: list[float]) -> tuple[float, float]:
    """In host memory, and freed on the GPU, before sharding.

    Args:
        config: the run.
        held: parameters of each level.
        kept: bytes that the rules keep of them.
    """
    on_gpu = WEIGHT_BYTES if config.train.dtype == Dtype.bf16 else 0
    host = freed = 0.0
    for count, state, moved in zip(held, kept, on_host(config), strict=True):
        if moved:
            host += WEIGHT_BYTES * count + state
            freed += on_gpu * count + state
    return host, freed


def host_plan(
    config: Config, levels: list[Level], vocabulary: int, cluster: Cluster, data_parallel: int
) -> HostPlan | None:
    """What is in host memory; None where nothing is.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        data_parallel: ranks that share a batch.
    """
    host = on_host(config)
    if not any(host):
        return None
    parallel = config.parallel
    group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
    nodes_sharing = 1 if parallel.shard_optimizer == Sharding.node else group_nodes
    sharing = parallel.tensor * data_parallel // group_nodes * nodes_sharing
    copies = data_parallel * parallel.tensor // sharing
    by_depth, kept = parameters_by_depth(config, vocabulary), kept_by_depth(config, vocabulary)
    state = [
        [moved_bytes(config, *_only(level, depth, by_depth, kept)) for depth in range(len(counts))]
        for level, counts in enumerate(by_depth)
    ]
    ranks = []
    for rank in range(parallel.pipeline):
        blocks = stage_blocks(config, vocabulary)[rank :: parallel.pipeline]
        depths = [depth for own in blocks for depth in own]
        series = np.zeros(cycle_steps(levels))
        for level in levels:
            for depth in depths:
                if size := state[level.index][depth][0]:
                    group = sync_group(level, depth, config.model.layers, config.levels.stagger)
                    add_updates(series, group, [size / sharing])
        sizes = [state[level.index][depth] for level in levels for depth in depths]
        ranks.append((sum(h for h, _ in sizes), sum(f for _, f in sizes), series))
    most, freed, _ = max(ranks, key=lambda found: found[0])
    mean, peak = (max(float(way(s)) for *_, s in ranks) for way in (np.mean, np.max))
    rate = cluster.pcie_gbyte * 1e9
    return HostPlan(
        levels=[
            HostLevel(level.name, copies * sum(size for size, _ in state[level.index]))
            for level in levels
            if host[level.index]
        ],
        gpu_bytes=most / sharing,
        node_bytes=copies * sum(size for size, *_ in ranks) / cluster.nodes,
        freed_bytes=freed / sharing,
        ring_bytes=ring_bytes(config),
        streamed_bytes_per_step=2 * mean,
        streamed_peak_bytes=2 * peak,
        waited_seconds_per_step=mean / rate,
        waited_peak_seconds=peak / rate,
    )


def _only(
    level: int, depth: int, held: list[list[int]], kept: list[list[int]]
) -> tuple[list[float], list[float]]:
    """Of each level what it has at a depth, all but one having nothing."""
    found = [[0.0] * len(held), [0.0] * len(held)]
    found[0][level], found[1][level] = held[level][depth], kept[level][depth]
    return found[0], found[1]

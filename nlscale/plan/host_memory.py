"""What levels of `memory: host` and `nvme` take of a node's memory, free on a GPU, and wait for.

    state     4 bytes a parameter, the fp32 weights, and what the rule keeps; sharded as elsewhere
    host      that of levels of `memory: host`; with `memory: nvme` two buffers, each of the largest
              sync group that a rank has on a drive (`nlscale.plan.nvme`)
    freed     the state on the GPU, in fp32 without the weights, which are the model's own there
    streamed  the state at each update, in and out; with `update: cpu` 4 bytes of gradient a
              parameter out, and the weight in the dtype of training in

An update takes what comes in at the rate of `pcie_gbyte` of the cluster file. While it comes in,
the way back is free for what is done with, and what is left of that goes back while the next step
computes; so a step waits for one way (`nlscale.levels.ring`), and with `update: cpu` for gradients
(and for the host's arithmetic, which is not counted). Nothing of host memory is read ahead: what
comes in is not hidden by the steps of a period in which a level is idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config, Dtype, Sharding, Updater
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.kept import kept_by_depth
from nlscale.levels.ring_pieces import off_device, on_host, on_nvme, ring_bytes, streamed
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
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
    """In host memory, of one GPU, buffers before a drive included."""
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
    """For what comes in, or for gradients that go out, the mean."""
    waited_peak_seconds: float
    """At the largest step."""


def moved_bytes(
    config: Config, held: Sequence[float], kept: Sequence[float], which: Sequence[bool]
) -> tuple[float, float]:
    """State that is moved off the GPU, and bytes freed there, before sharding.

    Args:
        config: the run.
        held: parameters of each level.
        kept: bytes that the rules keep of them.
        which: levels that count.
    """
    on_gpu = WEIGHT_BYTES if config.train.dtype == Dtype.bf16 else 0
    moved = freed = 0.0
    for count, state, own in zip(held, kept, which, strict=True):
        if own:
            moved += WEIGHT_BYTES * count + state
            freed += on_gpu * count + state
    return moved, freed


@dataclass(frozen=True)
class Shares:
    """Over how many ranks state is spread, and how many copies of it there are."""

    sharing: int
    copies: int

    @classmethod
    def of(cls, config: Config, cluster: Cluster, data_parallel: int) -> Shares:
        parallel = config.parallel
        group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
        nodes_sharing = 1 if parallel.shard_optimizer == Sharding.node else group_nodes
        sharing = parallel.tensor * data_parallel // group_nodes * nodes_sharing
        return cls(sharing, data_parallel * parallel.tensor // sharing)


def bytes_of_groups(
    config: Config, levels: list[Level], vocabulary: int, which: Sequence[bool]
) -> list[dict[SyncGroup, tuple[float, float]]]:
    """State and parameters of each sync group on each pipeline rank, before sharding.

    Args:
        config: the run.
        levels: its spectrum.
        vocabulary: token ids of the model.
        which: levels that count.
    """
    by_depth, kept = parameters_by_depth(config, vocabulary), kept_by_depth(config, vocabulary)
    ranks = []
    for rank in range(config.parallel.pipeline):
        blocks = stage_blocks(config, vocabulary)[rank :: config.parallel.pipeline]
        found: dict[SyncGroup, tuple[float, float]] = {}
        for level in levels:
            for depth in (depth for own in blocks for depth in own if which[level.index]):
                count, state = by_depth[level.index][depth], kept[level.index][depth]
                if not count:
                    continue
                group = sync_group(level, depth, config.model.layers, config.levels.stagger)
                size, parameters = found.get(group, (0.0, 0.0))
                size += WEIGHT_BYTES * count + state
                found[group] = (size, parameters + count)
        ranks.append(found)
    return ranks


def host_plan(
    config: Config, levels: list[Level], vocabulary: int, cluster: Cluster, data_parallel: int
) -> HostPlan | None:
    """What is in host memory or passes through it; None where nothing is.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        data_parallel: ranks that share a batch.
    """
    moved = off_device(config)
    if not any(moved):
        return None
    shares, host, nvme = Shares.of(config, cluster, data_parallel), on_host(config), on_nvme(config)
    weight = 2 if config.train.dtype == Dtype.bf16 else 4
    by_rank = bytes_of_groups(config, levels, vocabulary, moved)
    ranks = []
    for groups in by_rank:
        both, waited = (np.zeros(cycle_steps(levels)) for _ in range(2))
        for group, (size, parameters) in groups.items():
            ways = (2.0 * size, size)
            if config.levels.spectrum[group.level].update == Updater.cpu:
                ways = (parameters * (4.0 + weight), 4.0 * parameters)
            for series, each in zip((both, waited), ways, strict=True):
                add_updates(series, group, [each / shares.sharing])
        there = sum(size for group, (size, _) in groups.items() if host[group.level])
        there += 2 * max((size for g, (size, _) in groups.items() if nvme[g.level]), default=0)
        freed = sum(
            size - (0 if weight == 2 else WEIGHT_BYTES * parameters)
            for size, parameters in groups.values()
        )
        ranks.append((there, freed, both, waited))
    most, freed = max((there, freed) for there, freed, *_ in ranks)
    rate = cluster.pcie_gbyte * 1e9
    of_levels = [
        sum(s for own in by_rank for g, (s, _) in own.items() if g.level == level.index)
        for level in levels
    ]
    return HostPlan(
        levels=[
            HostLevel(level.name, shares.copies * of_levels[level.index])
            for level in levels
            if host[level.index]
        ],
        gpu_bytes=most / shares.sharing,
        node_bytes=shares.copies * sum(there for there, *_ in ranks) / cluster.nodes,
        freed_bytes=freed / shares.sharing,
        ring_bytes=ring_bytes(config) if any(streamed(config)) else 0,
        streamed_bytes_per_step=max(float(np.mean(both)) for *_, both, _ in ranks),
        streamed_peak_bytes=max(float(np.max(both)) for *_, both, _ in ranks),
        waited_seconds_per_step=max(float(np.mean(waited)) for *_, waited in ranks) / rate,
        waited_peak_seconds=max(float(np.max(waited)) for *_, waited in ranks) / rate,
    )

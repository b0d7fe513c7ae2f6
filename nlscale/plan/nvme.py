"""What levels of `memory: nvme` take of the drives of a node, write to them, and wait for them.

A rank reads a sync group's state before the group is due and writes it back after, each at its
share of what the drives of a node do in that direction (`nvme_gbyte` of the cluster file). Two
buffers hold what is read ahead: of the groups that are due at one step two are there, if since the
step before at which any was due there has been time to read them; further ones are read, and those
before written, while the step waits (`nlscale.levels.nvme`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config
from nlscale.levels.ring_pieces import on_nvme
from nlscale.levels.spectrum import Level, SyncGroup
from nlscale.plan.host_memory import Shares, bytes_of_groups
from nlscale.plan.traffic import cycle_steps

_BUFFERS = 2
_LONGEST = 4096
"""Steps of a cycle that are looked at, at most."""


@dataclass(frozen=True)
class NvmePlan:
    """What lies on drives, of the pipeline rank that has most of it."""

    levels: list[str]
    """Names of those levels."""
    gpu_bytes: float
    """Of the state of one GPU."""
    node_bytes: float
    """The same of a node, the mean over nodes."""
    written_bytes: float
    """By the updates of the run to the drives of a node, the mean over nodes; as many are read."""
    endurance: float | None
    """Share of what a node's drives may be written in their life; None: not known."""
    stream_seconds_per_step: float
    """That reading takes, and writing beside it, the mean of a cycle."""
    stream_peak_seconds: float
    """The same for the groups of one step, at most."""
    mean_bytes: float
    """That a rank reads a step, and writes as many, the mean of a cycle."""
    hidden_from_seconds: float
    """If a step takes that long, or longer, what two buffers hold is there when it is due."""
    waited_peak_seconds: float
    """That a step waits all the same, at most, for groups beyond those."""


def nvme_plan(
    config: Config, levels: list[Level], vocabulary: int, cluster: Cluster, data_parallel: int
) -> NvmePlan | None:
    """What is on drives; None where nothing is.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        data_parallel: ranks that share a batch.
    """
    there = on_nvme(config)
    if not any(there):
        return None
    shares = Shares.of(config, cluster, data_parallel)
    by_rank = [
        {group: size / shares.sharing for group, (size, _) in groups.items()}
        for groups in bytes_of_groups(config, levels, vocabulary, there)
    ]
    rate = cluster.nvme_gbyte * 1e9 / cluster.gpus_per_node
    steps = min(cycle_steps(levels), _LONGEST)
    streams = [_Stream.of(sizes, steps, rate) for sizes in by_rank]
    on_node = shares.copies * shares.sharing / cluster.nodes
    written = sum(
        on_node * size * group.updates(config.train.steps)
        for sizes in by_rank
        for group, size in sizes.items()
    )
    endurance = cluster.nvme_endurance_tb
    return NvmePlan(
        levels=[level.name for level in levels if there[level.index]],
        gpu_bytes=max(sum(sizes.values()) for sizes in by_rank),
        node_bytes=on_node * sum(sum(sizes.values()) for sizes in by_rank),
        written_bytes=written,
        endurance=None if endurance is None else written / (endurance * 1e12),
        stream_seconds_per_step=max(own.mean for own in streams),
        stream_peak_seconds=max(own.peak for own in streams),
        mean_bytes=max(own.mean for own in streams) * rate,
        hidden_from_seconds=max(own.hidden_from for own in streams),
        waited_peak_seconds=max(own.waited for own in streams),
    )


@dataclass(frozen=True)
class _Stream:
    """Seconds of a rank, one way."""

    mean: float
    peak: float
    hidden_from: float
    waited: float

    @classmethod
    def of(cls, sizes: dict[SyncGroup, float], steps: int, rate: float) -> _Stream:
        """Over a cycle after the first, in which phases have cut periods short.

        Args:
            sizes: bytes of each group.
            steps: of a cycle.
            rate: bytes a second.
        """
        due = {
            step: sorted(
                (size for g, size in sizes.items() if (step - g.phase) % g.period == 0),
                reverse=True,
            )
            for step in range(1, 2 * steps + 1)
        }
        at = [step for step, own in due.items() if own]
        gaps = {step: step - before for before, step in itertools.pairwise(at)}
        cycle = [step for step in gaps if step > steps]
        ahead = {step: sum(due[step][:_BUFFERS]) / rate for step in cycle}
        beyond = [sum(due[step][_BUFFERS:]) / rate for step in cycle]
        return cls(
            mean=sum(sum(due[step]) for step in cycle) / rate / steps,
            peak=max((sum(due[step]) / rate for step in cycle), default=0.0),
            hidden_from=max((ahead[step] / gaps[step] for step in cycle), default=0.0),
            waited=2 * max(beyond, default=0.0),
        )

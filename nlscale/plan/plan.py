"""A configuration on a cluster: updates and traffic of each level, memory, pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nlscale.cluster.machines import UTILISATION, Cluster
from nlscale.config.curriculum import curriculum
from nlscale.config.parts import parts_of
from nlscale.config.periods import Piece
from nlscale.config.vocabulary import Config, Reduction, Sharding
from nlscale.levels.notes import approximate, slow_level_warnings
from nlscale.levels.spectrum import (
    Level,
    levels_of,
    periods_to_plain,
    planned_outer_steps,
    planned_updates,
)
from nlscale.model.sizes import level_parameters
from nlscale.plan.checkpoint import CheckpointPlan, checkpoint_plan
from nlscale.plan.host_memory import HostPlan, host_plan
from nlscale.plan.memory import GIB, USABLE, Memory
from nlscale.plan.nvme import NvmePlan, nvme_plan
from nlscale.plan.on_cluster import OnCluster
from nlscale.plan.pipeline import Pipeline
from nlscale.plan.programs import advise, serial_programs
from nlscale.plan.stages import Exposure, StagePlan, all_timed, fullest_of, stage_on
from nlscale.plan.traffic import Traffic, node_bytes, traffic
from nlscale.plan.whole import WholePlan, whole_plan


@dataclass(frozen=True)
class LevelPlan:
    """One level over the planned run."""

    name: str
    parts: list[str]
    """Of the model, see `nlscale.config.choices.Part`."""
    parameters: int
    period: int
    """Steps."""
    updates: int
    """Over the run, the last partial window included: of the sync group that makes most."""
    outer_every: int | None
    """Updates between two outer steps; None: it makes none."""
    outer_steps: int
    """Over the run, the last one included: of the sync group that makes most."""
    local: bool
    """Whether each node makes its own updates between them."""
    copy_rate: float | None = None
    """How far the copy that it holds goes at an update; None: it holds none."""
    periods: tuple[Piece, ...] = ()
    """Where it changes in the run; none: it does not."""

    @property
    def run_periods(self) -> tuple[Piece, ...]:
        """Those of the run, one where it does not change."""
        return self.periods or (Piece(0, self.period),)


@dataclass(frozen=True)
class Sharded:
    """What a way of sharding the optimizer state comes to."""

    optimizer_bytes: float
    """On the fullest GPU."""
    total_bytes: float
    """On that GPU, of all."""
    mean_bytes_per_step: float
    """Leaving a node, deferred."""


@dataclass(frozen=True)
class Plan:
    """What a run will do on a cluster. Traffic is in bytes leaving a node, the mean over nodes."""

    cluster: Cluster
    levels: list[LevelPlan]
    steps: int
    """Of the run."""
    stages: list[StagePlan]
    """Of the run; one where all its steps are alike."""
    fullest: StagePlan
    """Of these the one in which a GPU needs most memory. What depends on the batch is given for
    this one where there are several."""
    cycle: int
    """Steps after which the traffic repeats; where a period changes, all of the run."""
    aligned: Traffic
    """Deferred, every block at the same step."""
    staggered: Traffic
    """Deferred, phases by depth."""
    plain: float
    """A step of plain data parallel, which reduces every level at every step."""
    names_parts: bool
    """Whether a level of the configuration names its parts."""
    staggers: bool
    """Whether the configuration asks for staggered phases."""
    defers: bool
    """Whether it reduces when due; if not, it sends what plain data parallel sends."""
    group_nodes: int
    """Nodes that a data-parallel group spans."""
    sharding: dict[Sharding, Sharded]
    """What each way of sharding the optimizer state comes to; with local levels there is one."""
    shards: Sharding
    """As configured."""
    whole: WholePlan | None
    """Of rules over whole matrices; None where no level has one."""
    host: HostPlan | None
    """Of state in host memory; None where there is none."""
    nvme: NvmePlan | None
    """Of state on drives; None where there is none."""
    checkpoint: CheckpointPlan
    serial_programs: int | None
    """Of a micro batch, see `nlscale.plan.programs`."""
    advice: list[str]
    """What would use the GPUs better."""
    warnings: list[str]

    @property
    def parameters(self) -> int:
        return sum(level.parameters for level in self.levels)

    @property
    def tokens_per_step(self) -> int:
        return self.fullest.stage.tokens_per_step

    @property
    def tokens(self) -> int:
        """Of the run."""
        return sum(own.stage.tokens for own in self.stages)

    @property
    def run_flops(self) -> float:
        """Model FLOPs of the run."""
        return sum(own.flops_per_step * own.stage.steps for own in self.stages)

    @property
    def run_seconds(self) -> float | None:
        """That its steps take, with what they wait for the link and for state in host memory;
        None: not known."""
        seconds = [own.seconds for own in self.stages]
        streams = 0.0 if self.host is None else self.steps * self.host.waited_seconds_per_step
        return None if None in seconds else sum(filter(None, seconds)) + streams

    @property
    def flops(self) -> dict[str, float]:
        """Model FLOPs of a training token by part of the model, see `nlscale.model.flops`."""
        return self.fullest.flops

    @property
    def activations(self) -> float:
        """Bytes of activations between pipeline ranks, a step; not in the traffic of the levels."""
        return self.fullest.activations

    @property
    def memory(self) -> Memory:
        return self.fullest.memory

    @property
    def pipeline(self) -> Pipeline:
        return self.fullest.pipeline

    @property
    def exposure(self) -> Exposure | None:
        """None where no gradient crosses, or how long a step computes is not known."""
        return self.fullest.exposure

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes than plain data parallel on average; None on one node."""
        return self.plain / self.aligned.mean if self.plain else None

    def reductions(self, level: LevelPlan) -> int:
        """Of a level across nodes in the run: of the sync group that makes most."""
        if level.copy_rate is not None:
            return 0
        if level.local:
            return level.outer_steps
        return level.updates if self.defers else self.steps

    @property
    def run_bytes(self) -> list[float]:
        """That a node sends in all of the run, deferred, of each level."""
        return [*map(float, (self.staggered if self.staggers else self.aligned).run_per_level)]

    @property
    def fits(self) -> bool:
        """Whether every GPU has the memory for it, and every node, as far as that is known."""
        return self.memory.fits and self.host_fits

    @property
    def host_fits(self) -> bool:
        return self.host is None or self.cluster.holds(self.host.node_bytes)

    def to_plain(self) -> dict[str, Any]:
        """The plan for JSON.

        - `cluster`: the cluster file
        - `steps`, `tokens`, `cycle_steps`: of the run; steps after which traffic repeats
        - `stages`: list of `StagePlan`, see `nlscale.config.curriculum`; where there are several,
          what depends on the batch (`tokens_per_step`, FLOPs, exposure, activations, memory,
          pipeline) is that of the stage in which a GPU needs most memory
        - `run_seconds`: of all steps, null where not known
        - `flops_per_token`: model FLOPs of a training token, forward and backward; `flops_by_part`
          the same by part of the model
        - `staggered`, `reduction`: what the configuration asks for
        - `levels`: list, fastest first, of `name`, `parts`, `parameters`, `period_steps`, `periods`
          (where that changes), `updates`, `reductions`, `outer_every` (updates between
          outer steps, null without), `local`, `copy_rate` (of a level that holds a copy, null
          without) and a level's share of the traffic, as in `total`
        - `total`: `parameters`, `mean_bytes_per_step`, `run_bytes` (of all steps),
          `peak_bytes_aligned` and `peak_bytes_staggered` (the largest step),
          `link_seconds_per_step` (mean)
        - `plain`: `bytes_per_step`, `link_seconds_per_step` of plain data parallel
        - `ratio`: `plain_to_mean` (times fewer bytes), `peak_aligned_to_plain`,
          `peak_staggered_to_plain`; null on one node
        - `exposure`: what of the link's time the backward pass hides, null where nothing crosses or
          the time of a step is not known: `step_seconds` that a step computes, `utilisation` (null:
          the seconds were given), `backward_seconds` of the last micro batch; `levels`, `run` and
          `plain`, each with `hidden_link_seconds` and `exposed_link_seconds` a step, means of a
          cycle: each level of the run, all of them, and plain data parallel
        - `activation_bytes_per_step`: of activations and their gradients between pipeline ranks,
          not part of the above
        - `checkpoint`: `bytes` on disk; `inter_node_bytes`, the reduction of unfinished windows
          and rounding errors; `host_bytes`, the copy in a node's memory to write from;
          `largest_file_bytes` of `files`; `resume_bytes` that all ranks read; of one checkpoint, at
          most
        - `shard_optimizer`: as configured; `sharding`: of each way, with
          `optimizer_bytes` and `total_bytes` on the fullest GPU and `mean_bytes_per_step`
        - `whole_matrices`: of rules over such, null without any; see `nlscale.plan.whole.WholePlan`
        - `host`: of state in host memory, null without any; see `nlscale.plan.host_memory.HostPlan`
        - `nvme`: of state on drives, null without any; see `nlscale.plan.nvme.NvmePlan`
        - `memory`: `ranks`, a list over the pipeline ranks of the bytes on one GPU, `weights`,
          `gradients`, `windows`, `optimizer`, `activations` and, in place of the latter after the
          backward pass, `update`, `validation` and `comparison` of the replicas; `total`;
          `fullest`, the one that needs most; `gpu_bytes`, what a GPU has; `usable_share`, how much
          of it counts
        - `fits`: whether `total` of the fullest is within the usable share, and the nodes have the
          memory for `host`, as far as that is known
        - `pipeline`: `ranks`, `virtual_stages`, `micro_batches`, `bubble` (share of a step in
          which a rank waits), `imbalance` (cost of the costliest stage over the mean)
        - `serial_programs`: of the memory's serial passes, of a micro batch; null without any
        - `advice`: what would use the GPUs better; `warnings`; lists of sentences

        Bytes of traffic are those leaving one node; link seconds are those bytes at the full rate.
        """
        seconds = self.cluster.link_seconds
        levels = [
            {
                "name": level.name,
                "parts": level.parts,
                "parameters": level.parameters,
                **periods_to_plain(level.run_periods),
                "updates": level.updates,
                "reductions": self.reductions(level),
                "outer_every": level.outer_every,
                "local": level.local,
                "copy_rate": level.copy_rate,
                "mean_bytes_per_step": float(self.aligned.mean_per_level[i]),
                "run_bytes": self.run_bytes[i],
                "peak_bytes_aligned": float(self.aligned.peak_per_level[i]),
                "peak_bytes_staggered": float(self.staggered.peak_per_level[i]),
                "link_seconds_per_step": seconds(float(self.aligned.mean_per_level[i])),
            }
            for i, level in enumerate(self.levels)
        ]
        plain = self.plain or None
        return {
            "cluster": {
                "name": self.cluster.name,
                "nodes": self.cluster.nodes,
                "gpus_per_node": self.cluster.gpus_per_node,
                "inter_node_gbit": self.cluster.inter_node_gbit,
                "gpu_memory_gib": self.cluster.gpu_memory_gib,
            },
            "steps": self.steps,
            "tokens": self.tokens,
            "stages": [own.to_plain() for own in self.stages],
            "run_seconds": self.run_seconds,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_token": sum(self.flops.values()),
            "flops_by_part": self.flops,
            "cycle_steps": self.cycle,
            "staggered": self.staggers,
            "reduction": (Reduction.deferred if self.defers else Reduction.every_step).value,
            "levels": levels,
            "total": {
                "parameters": self.parameters,
                "mean_bytes_per_step": self.aligned.mean,
                "run_bytes": sum(self.run_bytes),
                "peak_bytes_aligned": self.aligned.peak,
                "peak_bytes_staggered": self.staggered.peak,
                "link_seconds_per_step": seconds(self.aligned.mean),
            },
            "plain": {
                "bytes_per_step": self.plain,
                "link_seconds_per_step": seconds(self.plain),
            },
            "ratio": {
                "plain_to_mean": self.fewer,
                "peak_aligned_to_plain": plain and self.aligned.peak / plain,
                "peak_staggered_to_plain": plain and self.staggered.peak / plain,
            },
            "exposure": self.exposure
            and self.exposure.to_plain([level.name for level in self.levels]),
            "activation_bytes_per_step": self.activations,
            "checkpoint": asdict(self.checkpoint),
            "shard_optimizer": self.shards.value,
            "sharding": {way.value: asdict(found) for way, found in self.sharding.items()},
            "whole_matrices": None if self.whole is None else asdict(self.whole),
            "host": None if self.host is None else asdict(self.host),
            "nvme": None if self.nvme is None else asdict(self.nvme),
            "memory": {
                "ranks": [{**asdict(rank), "total": rank.total} for rank in self.memory.ranks],
                "fullest": self.memory.fullest,
                "gpu_bytes": self.memory.gpu_gib * GIB,
                "usable_share": USABLE,
            },
            "fits": self.fits,
            "pipeline": asdict(self.pipeline),
            "serial_programs": self.serial_programs,
            "advice": self.advice,
            "warnings": self.warnings,
        }


def make_plan(
    config: Config,
    cluster: Cluster,
    utilisation: float = UTILISATION,
    step_seconds: float | None = None,
) -> Plan:
    """Plan a run, also one that needs more memory than there is; `Plan.fits` says so.

    Args:
        config: the run.
        cluster: the machines.
        utilisation: share of the GPUs' peak at which a step computes (MFU).
        step_seconds: that a step computes; null: by the utilisation.

    Raises:
        UserError: the configuration cannot be spread over the cluster, or its vocabulary is
            unknown.
    """
    on, nodes, levels = OnCluster.of(config, cluster), cluster.nodes, levels_of(config)
    vocabulary, data_parallel, group_nodes = on.vocabulary, on.data_parallel, on.group_nodes
    parameters, parts = level_parameters(config, vocabulary), parts_of(config)
    level_plans = [
        LevelPlan(
            name=level.name,
            parts=[part.value for part in parts.of_level(level.index)],
            parameters=parameters[level.index],
            period=level.period,
            updates=planned_updates(config, level),
            periods=() if level.changes is None else level.changes.pieces,
            outer_every=None if level.outer is None else level.outer.every,
            outer_steps=planned_outer_steps(config, level),
            local=level.local,
            copy_rate=None if level.copy is None else level.copy.rate,
        )
        for level in levels
    ]

    def deferred(stagger: bool) -> Traffic:
        reduction = Reduction.deferred
        return traffic(config, levels, vocabulary, nodes, stagger, reduction, group_nodes)

    aligned, staggered = deferred(stagger=False), deferred(stagger=True)
    own = all_timed(_stages(config, on), levels, on, utilisation, step_seconds)
    fullest = fullest_of(own)
    return Plan(
        cluster=cluster,
        levels=level_plans,
        steps=config.train.steps,
        stages=own,
        cycle=len(aligned.per_step),
        aligned=aligned,
        staggered=staggered,
        plain=node_bytes(sum(parameters), nodes, group_nodes),
        names_parts=any(entry.parts is not None for entry in config.levels.spectrum),
        staggers=config.levels.stagger,
        defers=config.levels.reduction == Reduction.deferred,
        group_nodes=group_nodes,
        fullest=fullest,
        sharding={way: _sharded(config, cluster, way) for way in _ways(levels)},
        shards=config.parallel.shard_optimizer,
        whole=whole_plan(
            config,
            levels,
            vocabulary,
            cluster,
            data_parallel // group_nodes,
            group_nodes,
            fullest.flops_per_step,
            utilisation,
        ),
        host=host_plan(config, levels, vocabulary, cluster, data_parallel),
        nvme=nvme_plan(config, levels, vocabulary, cluster, data_parallel),
        checkpoint=checkpoint_plan(config, levels, vocabulary, cluster, group_nodes),
        serial_programs=serial_programs(config),
        advice=advise(
            config, vocabulary, data_parallel, lambda other: memory_on(other, cluster).fits
        ),
        warnings=[
            *slow_level_warnings(config, levels),
            *approximate(levels, crosses=group_nodes > 1),
        ],
    )


def memory_on(config: Config, cluster: Cluster) -> Memory:
    """The memory alone of a run on a cluster, of the stage that needs most.

    Raises:
        UserError: as `make_plan`.
    """
    return fullest_of(_stages(config, OnCluster.of(config, cluster))).memory


def _stages(config: Config, on: OnCluster) -> list[StagePlan]:
    levels = levels_of(config)
    return [stage_on(config, stage, levels, on) for stage in curriculum(config)]


def _ways(levels: list[Level]) -> list[Sharding]:
    """Of sharding the optimizer state: nodes that each update a level share nothing of its."""
    return [Sharding.node] if any(level.local for level in levels) else [*Sharding]


def _sharded(config: Config, cluster: Cluster, way: Sharding) -> Sharded:
    """What a way of sharding the optimizer state comes to, whatever is configured, deferred."""
    config = replace(
        config,
        parallel=replace(config.parallel, shard_optimizer=way),
        levels=replace(config.levels, reduction=Reduction.deferred),
    )
    on, levels = OnCluster.of(config, cluster), levels_of(config)
    rank = memory_on(config, cluster).largest
    sent = traffic(
        config,
        levels,
        on.vocabulary,
        cluster.nodes,
        False,
        Reduction.deferred,
        on.group_nodes,
    )
    return Sharded(rank.optimizer, rank.total, sent.mean)

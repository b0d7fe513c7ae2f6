"""A configuration on a cluster: updates and traffic of each level, memory, pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nlscale.cluster.machines import UTILISATION, Cluster
from nlscale.cluster.spread import check_tensor
from nlscale.config.vocabulary import Config, Reduction, Sharding, TrainConfig, WireFormat
from nlscale.data.index import read_index
from nlscale.errors import UserError
from nlscale.levels.spectrum import (
    approximate,
    planned_updates,
    slow_level_warnings,
    spectrum,
)
from nlscale.model.flops import flops_by_part
from nlscale.model.sizes import level_parameters
from nlscale.plan.checkpoint import CheckpointPlan, checkpoint_plan
from nlscale.plan.checks import check_sizes
from nlscale.plan.link import Links, LinkTime, compute_seconds
from nlscale.plan.memory import GIB, USABLE, Memory, memory
from nlscale.plan.pipeline import Pipeline, pipeline
from nlscale.plan.programs import advise, serial_programs
from nlscale.plan.traffic import Traffic, activation_bytes, cycle_steps, node_bytes, traffic
from nlscale.plan.whole import WholePlan, whole_plan


@dataclass(frozen=True)
class LevelPlan:
    """One level over the planned run."""

    name: str
    parameters: int
    period: int
    """Steps."""
    updates: int
    """Over the run, the last partial window included: of the sync group that makes most."""


@dataclass(frozen=True)
class Exposure:
    """What of the link's time a step hides, and what it waits for; means of a cycle."""

    step_seconds: float
    """That a step computes."""
    utilisation: float | None
    """Share of the GPUs' peak that this follows from; None: it was given."""
    backward_seconds: float
    """Of the last micro batch, in which the link can hide."""
    run: LinkTime
    """As configured."""
    plain: LinkTime
    """Of plain data parallel that overlaps as configured."""


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
    tokens_per_step: int
    flops: dict[str, float]
    """Model FLOPs of a training token by part of the model, see `nlscale.model.flops`."""
    cycle: int
    """Steps after which the traffic repeats."""
    aligned: Traffic
    """Deferred, every block at the same step."""
    staggered: Traffic
    """Deferred, phases by depth."""
    plain: float
    """A step of plain data parallel, which reduces every level at every step."""
    staggers: bool
    """Whether the configuration asks for staggered phases."""
    defers: bool
    """Whether it reduces when due; if not, it sends what plain data parallel sends."""
    group_nodes: int
    """Nodes that a data-parallel group spans."""
    activations: float
    """Bytes of activations between pipeline ranks, a step; not in the traffic of the levels."""
    memory: Memory
    exposure: Exposure | None
    """None where no gradient crosses, or how long a step computes is not known."""
    sharding: dict[Sharding, Sharded]
    """What each way of sharding the optimizer state comes to."""
    shards: Sharding
    """As configured."""
    whole: WholePlan | None
    """Of rules over whole matrices; None where no level has one."""
    pipeline: Pipeline
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
    def fewer(self) -> float | None:
        """How many times fewer bytes than plain data parallel on average; None on one node."""
        return self.plain / self.aligned.mean if self.plain else None

    @property
    def fits(self) -> bool:
        """Whether every GPU has the memory for it."""
        return self.memory.fits

    def to_plain(self) -> dict[str, Any]:
        """The plan for JSON.

        - `cluster`: the cluster file
        - `steps`, `tokens_per_step`, `cycle_steps`: of the run; steps after which traffic repeats
        - `flops_per_token`: model FLOPs of a training token, forward and backward; `flops_by_part`
          the same by part of the model
        - `staggered`, `reduction`: what the configuration asks for
        - `levels`: list, fastest first, of `name`, `parameters`, `period_steps`, `updates` and a
          level's share of the traffic, as in `total`
        - `total`: `parameters`, `mean_bytes_per_step`, `peak_bytes_aligned` and
          `peak_bytes_staggered` (the largest step), `link_seconds_per_step` (mean)
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
        - `checkpoint`: `bytes` on disk; `inter_node_bytes`, the reduction of unfinished windows;
          `host_bytes`, the copy in a node's memory to write from; `largest_file_bytes` of `files`;
          `resume_bytes` that all ranks read; of one checkpoint, at most
        - `shard_optimizer`: as configured; `sharding`: of each way, with
          `optimizer_bytes` and `total_bytes` on the fullest GPU and `mean_bytes_per_step`
        - `whole_matrices`: of rules over such, null without any; see `nlscale.plan.whole.WholePlan`
        - `memory`: `ranks`, a list over the pipeline ranks of the bytes on one GPU, `weights`,
          `gradients`, `windows`, `optimizer`, `activations` and, in place of the latter after the
          backward pass, `update`, `validation` and `comparison` of the replicas; `total`;
          `fullest`, the one that needs most; `gpu_bytes`, what a GPU has; `usable_share`, how much
          of it counts
        - `fits`: whether `total` of the fullest is within the usable share
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
                "parameters": level.parameters,
                "period_steps": level.period,
                "updates": level.updates,
                "mean_bytes_per_step": float(self.aligned.mean_per_level[i]),
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
            "exposure": self._exposure(),
            "activation_bytes_per_step": self.activations,
            "checkpoint": asdict(self.checkpoint),
            "shard_optimizer": self.shards.value,
            "sharding": {way.value: asdict(found) for way, found in self.sharding.items()},
            "whole_matrices": None if self.whole is None else asdict(self.whole),
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

    def _exposure(self) -> dict[str, Any] | None:
        if self.exposure is None:
            return None
        run = self.exposure.run
        return {
            "step_seconds": self.exposure.step_seconds,
            "utilisation": self.exposure.utilisation,
            "backward_seconds": self.exposure.backward_seconds,
            "levels": [
                {"name": level.name, **_link_time(run, slice(i, i + 1))}
                for i, level in enumerate(self.levels)
            ],
            "run": _link_time(run),
            "plain": _link_time(self.exposure.plain),
        }


def _link_time(time: LinkTime, levels: slice = slice(None)) -> dict[str, float]:
    return {
        "hidden_link_seconds": sum(time.hidden[levels]),
        "exposed_link_seconds": sum(time.exposed[levels]),
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
    vocabulary = vocabulary_of(config)
    data_parallel = check(config, cluster, vocabulary)
    parallel, nodes = config.parallel, cluster.nodes
    group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
    tokens_per_step = config.train.global_batch * config.data.sequence_length
    levels = spectrum(config.levels, tokens_per_step)
    parameters = level_parameters(config, vocabulary)
    steps = config.train.steps
    level_plans = [
        LevelPlan(
            name=level.name,
            parameters=parameters[level.index],
            period=level.period,
            updates=planned_updates(level, config.model.layers, config.levels.stagger, steps),
        )
        for level in levels
    ]

    def deferred(stagger: bool) -> Traffic:
        reduction = Reduction.deferred
        return traffic(config, levels, vocabulary, nodes, stagger, reduction, group_nodes)

    cycle = cycle_steps(levels)
    aligned, staggered = deferred(stagger=False), deferred(stagger=True)
    flops = flops_by_part(config, vocabulary)
    model_flops = sum(flops.values()) * tokens_per_step
    passes = pipeline(config, vocabulary, _micro_batches(config.train, data_parallel))
    computes = step_seconds or compute_seconds(
        cluster, model_flops, utilisation, config.train.dtype
    )
    exposure = None
    if group_nodes > 1 and computes is not None:
        plain = [replace(level, wire=WireFormat.fp32) for level in levels]
        sums = replace(config, parallel=replace(parallel, shard_optimizer=Sharding.node))
        links, plain_links = (
            Links(what, spectrum, vocabulary, cluster, group_nodes, passes, computes)
            for what, spectrum in ((config, levels), (sums, plain))
        )
        stagger = config.levels.stagger
        exposure = Exposure(
            step_seconds=computes,
            utilisation=None if step_seconds else utilisation,
            backward_seconds=links.backward_seconds,
            run=links.time(config.levels.reduction, stagger, cycle),
            plain=plain_links.time(Reduction.every_step, stagger, cycle),
        )
    return Plan(
        cluster=cluster,
        levels=level_plans,
        steps=steps,
        tokens_per_step=tokens_per_step,
        flops=flops,
        cycle=len(aligned.per_step),
        aligned=aligned,
        staggered=staggered,
        plain=node_bytes(sum(parameters), nodes, group_nodes),
        staggers=config.levels.stagger,
        defers=config.levels.reduction == Reduction.deferred,
        group_nodes=group_nodes,
        activations=activation_bytes(config, nodes, cluster.gpus_per_node),
        memory=memory_on(config, cluster),
        sharding={way: _sharded(config, cluster, way) for way in Sharding},
        shards=config.parallel.shard_optimizer,
        whole=whole_plan(
            config,
            levels,
            vocabulary,
            cluster,
            data_parallel // group_nodes,
            group_nodes,
            model_flops,
            utilisation,
        ),
        pipeline=passes,
        exposure=exposure,
        checkpoint=checkpoint_plan(config, levels, vocabulary, cluster, group_nodes),
        serial_programs=serial_programs(config),
        advice=advise(
            config, vocabulary, data_parallel, lambda other: memory_on(other, cluster).fits
        ),
        warnings=[
            *slow_level_warnings(levels, config.model.layers, config.levels.stagger, steps),
            *approximate(levels, crosses=group_nodes > 1),
        ],
    )


def memory_on(config: Config, cluster: Cluster) -> Memory:
    """The memory alone of a run on a cluster.

    Raises:
        UserError: as `make_plan`.
    """
    vocabulary = vocabulary_of(config)
    data_parallel = check(config, cluster, vocabulary)
    group_nodes = cluster.nodes_of_a_data_group(config.parallel.tensor, config.parallel.pipeline)
    levels = spectrum(config.levels, config.train.global_batch * config.data.sequence_length)
    micro_batches, in_node = (
        _micro_batches(config.train, data_parallel),
        data_parallel // group_nodes,
    )
    ranks = memory(config, levels, vocabulary, in_node, micro_batches, group_nodes)
    return Memory(ranks, cluster.gpu_memory_gib)


def _sharded(config: Config, cluster: Cluster, way: Sharding) -> Sharded:
    """What a way of sharding the optimizer state comes to, whatever is configured, deferred."""
    config = replace(
        config,
        parallel=replace(config.parallel, shard_optimizer=way),
        levels=replace(config.levels, reduction=Reduction.deferred),
    )
    parallel, vocabulary = config.parallel, vocabulary_of(config)
    group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
    levels = spectrum(config.levels, config.train.global_batch * config.data.sequence_length)
    rank = memory_on(config, cluster).largest
    sent = traffic(
        config, levels, vocabulary, cluster.nodes, False, Reduction.deferred, group_nodes
    )
    return Sharded(rank.optimizer, rank.total, sent.mean)


def _micro_batches(train: TrainConfig, data_parallel: int) -> int:
    return train.global_batch // (train.micro_batch * data_parallel)


def vocabulary_of(config: Config) -> int:
    """Token ids of the model: `model.vocabulary`, else what the data were built with.

    Raises:
        UserError: neither is there.
    """
    if config.model.vocabulary is not None:
        return config.model.vocabulary
    try:
        return read_index(config.data.folders()[0])["vocabulary"]
    except UserError as error:
        raise UserError(f"{error}; or give model.vocabulary=N to plan without data") from None


def check(config: Config, cluster: Cluster, vocabulary: int) -> int:
    """Whether the configuration can be spread over the cluster.

    Returns:
        The data-parallel ranks, those that share a batch.

    Raises:
        UserError: the numbers that do not fit and what would.
    """
    tensor = config.parallel.tensor
    where = f"{cluster.name} ({cluster.nodes} x {cluster.gpus_per_node})"
    per_node = config.parallel.ranks_per_node
    if per_node not in (None, cluster.gpus_per_node):
        raise UserError(
            f"parallel.ranks_per_node is {per_node}, but {where} has {cluster.gpus_per_node} GPUs "
            f"a node; leave it null"
        )
    check_tensor(cluster.gpus_per_node, tensor)
    if vocabulary % tensor:
        raise UserError(
            f"model.vocabulary {vocabulary} is not divisible by parallel.tensor {tensor}; use "
            f"{-(-vocabulary // tensor) * tensor}"
        )
    return check_sizes(config, cluster.ranks)

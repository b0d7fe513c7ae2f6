"""What each stage of a run takes: memory, passes, and how long a step is (`config/curriculum`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nlscale.config.curriculum import TrainingStage, at_stage
from nlscale.config.vocabulary import Config, Reduction, Sharding, WireFormat
from nlscale.levels.spectrum import Level
from nlscale.model.flops import flops_by_part
from nlscale.plan.link import Links, LinkTime, compute_seconds
from nlscale.plan.memory import Memory, memory
from nlscale.plan.on_cluster import OnCluster
from nlscale.plan.pipeline import Pipeline, pipeline
from nlscale.plan.traffic import activation_bytes, cycle_steps


@dataclass(frozen=True)
class Exposure:
    """What of the link's time a step hides, and what it waits for; means of a cycle, or of the
    stage where a period changes in the run."""

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

    def to_plain(self, levels: list[str]) -> dict[str, Any]:
        """For JSON; see `nlscale.plan.plan.Plan.to_plain`.

        Args:
            levels: names, fastest first.
        """
        return {
            "step_seconds": self.step_seconds,
            "utilisation": self.utilisation,
            "backward_seconds": self.backward_seconds,
            "levels": [
                {"name": name, **_link_time(self.run, slice(i, i + 1))}
                for i, name in enumerate(levels)
            ],
            "run": _link_time(self.run),
            "plain": _link_time(self.plain),
        }


@dataclass(frozen=True)
class StagePlan:
    """A stage on a cluster."""

    stage: TrainingStage
    config: Config
    """The run with steps that are all those of the stage."""
    flops: dict[str, float]
    """Model FLOPs of a training token by part of the model, see `nlscale.model.flops`."""
    memory: Memory
    pipeline: Pipeline
    activations: float
    """Bytes between pipeline ranks that leave a node in a step, the mean over nodes."""
    computes: float | None = None
    """Seconds that a step computes; None: not known."""
    exposure: Exposure | None = None
    """None where no gradient crosses, or how long a step computes is not known."""

    @property
    def flops_per_step(self) -> float:
        return sum(self.flops.values()) * self.stage.tokens_per_step

    @property
    def waits(self) -> float:
        """Seconds of link time that a step does not hide."""
        return 0.0 if self.exposure is None else sum(self.exposure.run.exposed)

    @property
    def seconds(self) -> float | None:
        """Of all its steps; None: not known."""
        return None if self.computes is None else self.stage.steps * (self.computes + self.waits)

    def to_plain(self) -> dict[str, Any]:
        """For JSON; see `nlscale.plan.plan.Plan.to_plain`."""
        stage = self.stage
        return {
            "first_step": stage.first_step,
            "steps": stage.steps,
            "global_batch": stage.global_batch,
            "sequence_length": stage.sequence_length,
            "tokens_per_step": stage.tokens_per_step,
            "tokens": stage.tokens,
            "flops_per_token": sum(self.flops.values()),
            "memory_bytes": self.memory.largest.total,
            "fits": self.memory.fits,
            "micro_batches": self.pipeline.micro_batches,
            "bubble": self.pipeline.bubble,
            "activation_bytes_per_step": self.activations,
            "step_seconds": self.computes,
            "exposed_link_seconds": None if self.computes is None else self.waits,
        }


def stage_on(config: Config, stage: TrainingStage, levels: list[Level], on: OnCluster) -> StagePlan:
    """A stage of a run, but for its times."""
    config = at_stage(config, stage)
    cluster, micro_batches = on.cluster, micro_batches_of(config, stage, on.data_parallel)
    in_node = on.data_parallel // on.group_nodes
    ranks = memory(config, levels, on.vocabulary, in_node, micro_batches, on.group_nodes)
    return StagePlan(
        stage=stage,
        config=config,
        flops=flops_by_part(config, on.vocabulary),
        memory=Memory(ranks, cluster.gpu_memory_gib),
        pipeline=pipeline(config, on.vocabulary, micro_batches),
        activations=activation_bytes(config, cluster.nodes, cluster.gpus_per_node),
    )


def fullest_of(stages: list[StagePlan]) -> StagePlan:
    """The first of those in which a GPU needs most memory."""
    return max(stages, key=lambda own: own.memory.largest.total)


def all_timed(
    stages: list[StagePlan],
    levels: list[Level],
    on: OnCluster,
    utilisation: float,
    step_seconds: float | None,
) -> list[StagePlan]:
    """The stages with their times.

    Args:
        stages: of the run.
        levels: of the run, periods in steps.
        on: how it lies on the cluster.
        utilisation: share of the GPUs' peak at which a step computes (MFU).
        step_seconds: that a step of the fullest stage computes, and others by their FLOPs; None:
            by the utilisation.
    """
    fullest = fullest_of(stages)
    found = []
    for own in stages:
        given = step_seconds
        if given and own is not fullest:
            given *= own.flops_per_step / fullest.flops_per_step
        found.append(_timed(own, levels, on, utilisation, given))
    return found


def _timed(
    own: StagePlan,
    levels: list[Level],
    on: OnCluster,
    utilisation: float,
    step_seconds: float | None,
) -> StagePlan:
    config, cluster = own.config, on.cluster
    computes = step_seconds or compute_seconds(
        cluster, own.flops_per_step, utilisation, config.train.dtype
    )
    if on.group_nodes == 1 or computes is None:
        return replace(own, computes=computes)
    plain = [replace(level, wire=WireFormat.fp32, local=False) for level in levels]
    sums = replace(config, parallel=replace(config.parallel, shard_optimizer=Sharding.node))
    links, plain_links = (
        Links(what, spectrum, on.vocabulary, cluster, on.group_nodes, own.pipeline, computes)
        for what, spectrum in ((config, levels), (sums, plain))
    )
    stagger, steps = config.levels.stagger, _alike(own.stage, levels)
    exposure = Exposure(
        step_seconds=computes,
        utilisation=None if step_seconds else utilisation,
        backward_seconds=links.backward_seconds,
        run=links.time(config.levels.reduction, stagger, steps),
        plain=plain_links.time(Reduction.every_step, stagger, steps),
    )
    return replace(own, computes=computes, exposure=exposure)


def _alike(stage: TrainingStage, levels: list[Level]) -> range:
    """The steps of which a mean is that of the stage; of a long one the last, as many as of the
    longest cycle."""
    cycle = cycle_steps(levels)
    if all(level.changes is None for level in levels):
        return range(1, cycle + 1)
    return range(stage.first_step + 1, stage.first_step + stage.steps + 1)[-cycle:]


def micro_batches_of(config: Config, stage: TrainingStage, data_parallel: int) -> int:
    """That a rank passes through the model in a step of a stage."""
    return stage.global_batch // (config.train.micro_batch * data_parallel)


def _link_time(time: LinkTime, levels: slice = slice(None)) -> dict[str, float]:
    return {
        "hidden_link_seconds": sum(time.hidden[levels]),
        "exposed_link_seconds": sum(time.exposed[levels]),
    }

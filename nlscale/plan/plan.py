"""A configuration on a cluster: parameters, updates and inter-node traffic of each level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nlscale.config import Config, Reduction
from nlscale.data.index import read_index
from nlscale.errors import UserError
from nlscale.levels import reduction_bytes, spectrum
from nlscale.model.sizes import level_hidden, level_parameters
from nlscale.plan.cluster import Cluster
from nlscale.plan.traffic import Traffic, cycle_steps, group_parameters, traffic

FEW_UPDATES = 200
"""A level that updates less often in a run is warned about."""


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
class Plan:
    """What a run will do on a cluster. All traffic is in bytes leaving one node."""

    cluster: Cluster
    levels: list[LevelPlan]
    steps: int
    """Of the run."""
    tokens_per_step: int
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
    warnings: list[str]

    @property
    def parameters(self) -> int:
        return sum(level.parameters for level in self.levels)

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes than plain data parallel on average; None on one node."""
        return self.plain / self.aligned.mean if self.plain else None

    def to_plain(self) -> dict[str, Any]:
        """The plan for JSON.

        - `cluster`: the cluster file
        - `steps`, `tokens_per_step`, `cycle_steps`: of the run; steps after which traffic repeats
        - `staggered`, `reduction`: what the configuration asks for
        - `levels`: list, fastest first, of `name`, `parameters`, `period_steps`, `updates` and a
          level's share of the traffic, as in `total`
        - `total`: `parameters`, `mean_bytes_per_step`, `peak_bytes_aligned` and
          `peak_bytes_staggered` (the largest step), `link_seconds_per_step` (mean)
        - `plain`: `bytes_per_step`, `link_seconds_per_step` of plain data parallel
        - `ratio`: `plain_to_mean` (times fewer bytes), `peak_aligned_to_plain`,
          `peak_staggered_to_plain`; null on one node
        - `warnings`: list of sentences

        Bytes are those leaving one node; link seconds are those bytes at the full rate.
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
            },
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
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
            "warnings": self.warnings,
        }


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Plan a run.

    Raises:
        UserError: the configuration does not fit the cluster, or its vocabulary is unknown.
    """
    check(config, cluster)
    vocabulary = vocabulary_of(config)
    tokens_per_step = config.train.global_batch * config.data.sequence_length
    levels = spectrum(config.levels, tokens_per_step)
    parameters = level_parameters(config, vocabulary)
    groups = group_parameters(config, levels, vocabulary, config.levels.stagger)
    steps = config.train.steps
    level_plans = [
        LevelPlan(
            name=level.name,
            parameters=parameters[level.index],
            period=level.period,
            updates=max(g.updates(steps) for g in groups if g.level == level.index),
        )
        for level in levels
    ]
    deferred = Reduction.deferred
    return Plan(
        cluster=cluster,
        levels=level_plans,
        steps=steps,
        tokens_per_step=tokens_per_step,
        cycle=cycle_steps(levels),
        aligned=traffic(config, levels, vocabulary, cluster.nodes, False, deferred),
        staggered=traffic(config, levels, vocabulary, cluster.nodes, True, deferred),
        plain=reduction_bytes(sum(parameters), cluster.nodes),
        staggers=config.levels.stagger,
        defers=config.levels.reduction == deferred,
        warnings=[
            f"level {p.name!r} makes {p.updates} updates in {steps} steps, fewer than "
            f"{FEW_UPDATES}: it will learn little; train longer or shorten its period"
            for p in level_plans
            if p.updates < FEW_UPDATES
        ],
    )


def vocabulary_of(config: Config) -> int:
    """Token ids of the model: `model.vocabulary`, else what the data were built with.

    Raises:
        UserError: neither is there.
    """
    if config.model.vocabulary is not None:
        return config.model.vocabulary
    try:
        return read_index(config.data.dir)["vocabulary"]
    except UserError as error:
        raise UserError(f"{error}; or give model.vocabulary=N to plan without data") from None


def check(config: Config, cluster: Cluster) -> None:
    """Whether the configuration can run on the cluster.

    Raises:
        UserError: the numbers that do not fit and what would.
    """
    tensor, pipeline, train = config.parallel.tensor, config.parallel.pipeline, config.train
    for key, value in {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "train.global_batch": train.global_batch,
        "train.micro_batch": train.micro_batch,
        "train.steps": train.steps,
        "data.sequence_length": config.data.sequence_length,
        "model.layers": config.model.layers,
        "model.heads": config.model.heads,
        "model.d_model": config.model.d_model,
    }.items():
        if value <= 0:
            raise UserError(f"{key} is {value}; it must be greater than 0")
    ranks, where = cluster.ranks, f"{cluster.name} ({cluster.nodes} x {cluster.gpus_per_node})"
    per_node = config.parallel.ranks_per_node
    if per_node not in (None, cluster.gpus_per_node):
        raise UserError(
            f"parallel.ranks_per_node is {per_node}, but {where} has {cluster.gpus_per_node} GPUs "
            f"a node; leave it null"
        )
    if ranks % (tensor * pipeline):
        raise UserError(
            f"the {ranks} ranks of {where} do not divide by parallel.tensor {tensor} x "
            f"parallel.pipeline {pipeline}; choose two whose product divides {ranks}"
        )
    if pipeline > 1:
        raise UserError("parallel.pipeline > 1 cannot be planned yet; use parallel.tensor")
    if cluster.gpus_per_node % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {cluster.gpus_per_node} GPUs of a node "
            f"of {where}: layers would cross the network; use a divisor of {cluster.gpus_per_node}"
        )
    data_parallel = ranks // tensor
    at_once = f"train.micro_batch {train.micro_batch} x {data_parallel} data-parallel ranks"
    _divides("train.global_batch", train.global_batch, train.micro_batch * data_parallel, at_once)
    _divides("model.d_model", config.model.d_model, config.model.heads, "model.heads")
    _divides("model.heads", config.model.heads, tensor, "parallel.tensor")
    for level, hidden in zip(config.levels.spectrum, level_hidden(config), strict=True):
        _divides(f"hidden width of level {level.name!r}", hidden, tensor, "parallel.tensor")


def _divides(what: str, number: int, by: int, by_what: str) -> None:
    if number % by:
        near = sorted({number // by * by, -(-number // by) * by} - {0})
        raise UserError(
            f"{what} {number} is not divisible by {by_what} ({by}); "
            f"use {' or '.join(map(str, near))}"
        )

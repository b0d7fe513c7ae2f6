"""A configuration on a cluster: parameters, updates and inter-node traffic of each level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nlscale.checks import check_sizes
from nlscale.config import Config, Reduction
from nlscale.data.index import read_index
from nlscale.errors import UserError
from nlscale.levels import planned_updates, reduction_bytes, slow_level_warnings, spectrum
from nlscale.model.sizes import level_parameters
from nlscale.plan.cluster import Cluster
from nlscale.plan.traffic import Traffic, cycle_steps, traffic


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
        warnings=slow_level_warnings(levels, config.model.layers, config.levels.stagger, steps),
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
    tensor = config.parallel.tensor
    where = f"{cluster.name} ({cluster.nodes} x {cluster.gpus_per_node})"
    per_node = config.parallel.ranks_per_node
    if per_node not in (None, cluster.gpus_per_node):
        raise UserError(
            f"parallel.ranks_per_node is {per_node}, but {where} has {cluster.gpus_per_node} GPUs "
            f"a node; leave it null"
        )
    if cluster.gpus_per_node % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {cluster.gpus_per_node} GPUs of a node "
            f"of {where}: layers would cross the network; use a divisor of {cluster.gpus_per_node}"
        )
    check_sizes(config, cluster.ranks)

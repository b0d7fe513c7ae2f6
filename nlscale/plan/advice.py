"""What to change in a run that does not fit: the first of a few alternatives that does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config, Recompute
from nlscale.errors import UserError
from nlscale.plan.memory import GIB, USABLE
from nlscale.plan.plan import Plan, memory_on

_KEYS = (
    "parallel.pipeline",
    "parallel.stages",
    "parallel.tensor",
    "parallel.sequence",
    "train.micro_batch",
    "train.recompute",
)


def does_not_fit(plan: Plan, config: Config) -> str:
    """One line: what a GPU needs, what of it is largest, and what would fit.

    Args:
        plan: one that does not fit.
        config: what it is of.
    """
    memory, rank = plan.memory, plan.memory.largest
    if memory.fits and plan.host is not None:
        return (
            f"does not fit {plan.cluster.name}: levels of memory=host take "
            f"{plan.host.node_bytes / GIB:.3g} GiB of a node, which has "
            f"{plan.cluster.host_memory_gib:g} (host_memory_gib), a tenth of it for the rest; let "
            f"fewer levels have it, or spread them with parallel.shard_optimizer=all"
        )
    term = max(rank.terms, key=rank.terms.__getitem__)
    which = f" of pipeline rank {memory.fullest}" if len(memory.ranks) > 1 else ""
    says = (
        f"does not fit {plan.cluster.name}: a GPU{which} needs {rank.total / GIB:.3g} GiB of the "
        f"{memory.usable_gib:.3g} usable ({USABLE:.0%} of {memory.gpu_gib:g}), most of it {term}, "
        f"{rank.terms[term] / GIB:.3g} GiB"
    )
    better = fitting_overrides(config, plan.cluster)
    if better is None:
        return (
            f"{says}; no parallel.tensor, parallel.pipeline, train.recompute and "
            f"train.micro_batch fit: use more GPUs or a smaller model"
        )
    return f"{says}; use {' '.join(better)}"


def fitting_overrides(config: Config, cluster: Cluster) -> list[str] | None:
    """Overrides that make the configuration fit the cluster, the least costly tried; None: none.

    Tried in this order: recomputing, fewer sequences at once, more tensor-parallel ranks with the
    sequence split over them, more pipeline ranks; each with all that come before it.
    """
    for candidate in _alternatives(config, cluster):
        try:
            if memory_on(candidate, cluster).fits:
                return list(_differences(config, candidate))
        except UserError:
            continue  # sizes that do not divide
    return None


def _alternatives(config: Config, cluster: Cluster) -> Iterator[Config]:
    parallel, train = config.parallel, config.train
    parts: list[list[Recompute]] = [[], [Recompute.cms], [Recompute.mixer], list(Recompute)]
    for pipeline, tensor, halvings, more in itertools.product(
        _doublings(parallel.pipeline, cluster.ranks),
        _doublings(parallel.tensor, cluster.gpus_per_node),
        range(train.micro_batch.bit_length()),
        parts,
    ):
        spread = replace(
            parallel,
            pipeline=pipeline,
            tensor=tensor,
            sequence=parallel.sequence or tensor > parallel.tensor,
            stages=parallel.stages if pipeline == parallel.pipeline else None,
        )
        yield replace(
            config,
            parallel=spread,
            train=replace(
                train,
                micro_batch=train.micro_batch >> halvings,
                recompute=[part for part in Recompute if part in (*train.recompute, *more)],
            ),
        )


def _doublings(first: int, most: int) -> list[int]:
    return [first << i for i in range(most.bit_length()) if first << i <= most]


def _differences(config: Config, other: Config) -> Iterator[str]:
    for key in _KEYS:
        before, now = attrgetter(key)(config), attrgetter(key)(other)
        if key == "train.recompute":
            before, now = ([part.value for part in Recompute if part in x] for x in (before, now))
        if before != now:
            text = f"[{','.join(now)}]" if isinstance(now, list) else str(now).lower()
            yield f"{key}={'null' if now is None else text}"

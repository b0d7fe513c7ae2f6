"""The largest model of a recipe's shape that fits a cluster, with and without host memory.

A model of its shape has as much width a layer, heads of the same size, as many of them to each
key-value head, and hidden layers as wide beside the model's width; its levels, its batch and how it
is spread over ranks are the recipe's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nlscale.cluster.machines import Cluster
from nlscale.config.parts import parts_of
from nlscale.config.units import human_count
from nlscale.config.vocabulary import Config, Tier, Updater, kv_heads
from nlscale.errors import UserError
from nlscale.levels.kept import rules_by_level
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters
from nlscale.plan.host_memory import HostPlan, host_plan
from nlscale.plan.memory import GIB
from nlscale.plan.on_cluster import OnCluster, vocabulary_of
from nlscale.plan.plan import memory_on

_MULTIPLE = 8
"""Of hidden widths on each tensor-parallel rank."""
_DEEPEST = 100_000


@dataclass(frozen=True)
class Largest:
    """A model that fits, of which one with more layers does not."""

    layers: int
    d_model: int
    heads: int
    parameters: int
    gpu_gib: float
    """That it takes of the fullest GPU."""
    host_gib: float
    """Of a node's memory, for state."""


def largest(config: Config, cluster: Cluster) -> tuple[Largest | None, Largest | None]:
    """The largest model with all state on the GPUs, and with that of slow levels in host memory.

    None: not even the smallest fits.

    Args:
        config: the recipe.
        cluster: the machines.

    Raises:
        UserError: the recipe says where each stage begins, or cannot be spread over the cluster.
    """
    if config.parallel.stages is not None:
        raise UserError(
            "--largest changes model.layers, and parallel.stages says how many each stage has; "
            "leave that out"
        )
    vocabulary_of(config)
    return _largest(state_on_gpu(config), cluster), _largest(slow_on_host(config), cluster)


def of_size(config: Config, layers: int) -> Config:
    """The model of the recipe's shape with that many layers."""
    model, tensor = config.model, config.parallel.tensor
    together = tensor * (model.heads // kv_heads(model))
    heads = together * max(1, round(model.heads * layers / model.layers / together))
    wider = heads / model.heads
    d_model = round(model.d_model * wider)
    attention = model.attention
    if attention.kv_heads is not None:
        kept = attention.kv_heads * heads // model.heads
        attention = replace(attention, kv_heads=kept)

    def scaled(hidden: int | None) -> int | None:
        unit = _MULTIPLE * tensor
        return None if hidden is None else unit * max(1, round(hidden * wider / unit))

    spectrum = [replace(own, hidden=scaled(own.hidden)) for own in config.levels.spectrum]
    return replace(
        config,
        model=replace(
            model,
            layers=layers,
            heads=heads,
            d_model=d_model,
            hidden=scaled(model.hidden),
            attention=attention,
        ),
        levels=replace(config.levels, spectrum=spectrum),
    )


def _largest(config: Config, cluster: Cluster) -> Largest | None:
    step = config.parallel.pipeline * config.parallel.virtual_stages

    def fits(steps: int) -> bool:
        return fits_on(of_size(config, step * steps), cluster)

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high) and high * step < _DEEPEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    found = of_size(config, step * low)
    host = host_on(found, cluster)
    return Largest(
        layers=found.model.layers,
        d_model=found.model.d_model,
        heads=found.model.heads,
        parameters=sum(level_parameters(found, vocabulary_of(found))),
        gpu_gib=memory_on(found, cluster).largest.total / GIB,
        host_gib=0.0 if host is None else host.node_bytes / GIB,
    )


def say_largest(memory: str, found: Largest | None) -> str:
    """A line for a person.

    Args:
        memory: hbm, or host where slow levels have their state there.
        found: None: nothing fits.
    """
    where = {"hbm": "all state on the GPUs", "host": "state of slow levels in host memory"}[memory]
    if found is None:
        return f"{where}: no model of this shape fits"
    line = (
        f"{where}: {human_count(found.parameters)} parameters, {found.layers} layers, d_model "
        f"{found.d_model:,}, {found.heads} heads; {found.gpu_gib:.3g} GiB of a GPU"
    )
    return f"{line}, {found.host_gib:.3g} GiB of a node" if found.host_gib else line


def fits_on(config: Config, cluster: Cluster) -> bool:
    """Whether GPUs, and nodes where the cluster file says what they have, have the memory."""
    host = host_on(config, cluster)
    return memory_on(config, cluster).fits and (host is None or cluster.holds(host.node_bytes))


def host_on(config: Config, cluster: Cluster) -> HostPlan | None:
    """What lies in host memory of a run on a cluster; None: nothing.

    Raises:
        UserError: as `nlscale.plan.plan.make_plan`.
    """
    on = OnCluster.of(config, cluster)
    return host_plan(config, levels_of(config), on.vocabulary, cluster, on.data_parallel)


def state_on_gpu(config: Config) -> Config:
    """The run with the state of all levels on the GPU."""
    return _with_memory(config, [Tier.hbm] * len(config.levels.spectrum))


def slow_on_host(config: Config) -> Config:
    """The run with the state of all levels of a period above 1 that can be streamed in host
    memory."""
    return slow_in(config, Tier.host)


def slow_in(config: Config, memory: Tier) -> Config:
    """The same with it in another memory."""
    entries = zip(levels_of(config), config.levels.spectrum, rules_by_level(config), strict=True)
    parts = parts_of(config)
    copied = {*parts.mlps, *parts.copies} if parts.copies else set()
    return _with_memory(
        config,
        [
            memory
            if level.period > 1
            and entry.outer.every is None
            and not own.whole_matrices
            and level.index not in copied
            else entry.memory
            for level, entry, own in entries
        ],
    )


def _with_memory(config: Config, tiers: list[Tier]) -> Config:
    entries = zip(config.levels.spectrum, tiers, strict=True)
    spectrum = [
        replace(entry, memory=tier, update=entry.update if tier == Tier.host else Updater.device)
        for entry, tier in entries
    ]
    return replace(config, levels=replace(config.levels, spectrum=spectrum))

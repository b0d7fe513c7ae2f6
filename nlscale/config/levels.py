"""The keys of `levels` (docs/concepts/levels.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nlscale.config.choices import Part, PeriodRule, Phases, Reduction, Tier, Updater, WireFormat
from nlscale.config.context import ContextConfig
from nlscale.config.fields import MOST, path, within
from nlscale.config.outer import OuterConfig
from nlscale.config.period_warmup import PeriodWarmupConfig


@dataclass
class LevelConfig:
    """One level: the parts of the model that update together, once a period."""

    name: str = MISSING
    """Used in metrics and figures."""
    period: str = "1 step"
    """How often the level updates: '16 steps' or '8M tokens'."""
    parts: list[Part] | None = None
    """What of the model belongs to it: any of cms, mixer, embedding, head, norms. cms is an MLP of
    its own in each block; the others belong to one level each. Null: cms alone. What no level names
    belongs to the first, and a norm to the level of what it feeds."""
    hidden: int | None = within(None, above=0, most=MOST)
    """Hidden units of this level's MLP in each block; null: an equal share of model.hidden."""
    learning_rate: float = within(1.0, least=0)
    """Factor on optimizer.learning_rate for this level, beside the rule of its period."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Keys of `optimizer` that are otherwise for this level, such as {rule: muon}; its peak
    learning rate is a factor beside this."""
    wire: WireFormat = WireFormat.fp32
    """How its gradients cross between nodes. fp32: exactly. The others are approximate, each node's
    sum, and then the sum of all, being rounded. bf16: half the bytes; the error is not kept. int8
    and int4: a quarter and an eighth, and a scale for each block of values; the error is kept, and
    sent with the next sums."""
    memory: Tier = Tier.hbm
    """Where its fp32 weights and its rule's state lie between its updates. hbm: on the GPU. host:
    in the node's memory; an update streams them through a ring, and makes the same bits. nvme: the
    same on a drive of the node, in tiers.folder. Not of rules over whole matrices, nor with outer
    steps."""
    update: Updater = Updater.device
    """Of `memory: host`, what updates it. device: the GPU. cpu: the host, under the rule adamw, by
    an operation of DeepSpeed (`nlscale doctor --build cpu_adam`); 6 instead of 24 bytes a parameter
    cross PCIe, the host waits for the step, and the weights are those of device within 1e-6."""
    outer: OuterConfig = field(default_factory=OuterConfig)
    local: bool = False
    """Approximate: each node updates the level by its own gradient (DiLoCo); what crosses, as
    `wire` says, is what its updates have made, once an outer step. Needs outer.every."""
    context: ContextConfig = field(default_factory=ContextConfig)
    copy_rate: float = within(0.5, above=0, most=1)
    """Of a level that holds a copy (model.cms: nested): how far it goes at each of its updates to
    what the next faster level has become, which goes on from there. No schedule changes it; 1
    leaves the faster level where it is."""


@dataclass
class LevelsConfig:
    """The spectrum of levels, fastest first, and how they are reduced and learn.

    A recipe may give `levels` as a plain list; it is then the spectrum. An entry may be a bare
    period: ``levels=[1,4,16]``.
    """

    spectrum: list[LevelConfig] = field(default_factory=lambda: [LevelConfig(name="base")])
    """The levels. What is in no level's `parts` belongs to the first."""
    stagger: bool = True
    """Blocks at different depths update a slow level at different steps of its period, so that
    its traffic is spread evenly; the phase depends on depth only."""
    phases: Phases = Phases.by_depth
    """Which block has which phase. by_depth: in their order. interleaved: those of a pipeline stage
    are spread over the period, so that no rank sends or streams all of its own at once. Another
    order is another schedule of updates."""
    learning_rate_rule: PeriodRule = PeriodRule.none
    """How the learning rate grows with the period. The default is none: Adam's step does not
    shrink with a longer window."""
    reduction: Reduction = Reduction.deferred
    """deferred: a window crosses the inter-node network once, when due. every-step: at each step,
    with the same updates; only for measuring what deferral saves."""
    period_warmup: PeriodWarmupConfig = field(default_factory=PeriodWarmupConfig)
    """Periods that grow to those of the spectrum."""


@dataclass
class TiersConfig:
    """Memory beside the GPU's in which what updates slow levels lies."""

    ring_mib: float = within(256.0, least=0.0625, most=2**16)
    """GPU memory, MiB, through which levels of `memory: host` and nvme are streamed, in three
    slots: while one is updated the next comes in and the one before goes out."""
    folder: str | None = path(None)
    """Folder on a drive of each node for levels of `memory: nvme`; its files have no names, and go
    with the run. Not on a network file system."""
    threads: int = within(4, least=1, most=64)
    """Of a rank, that read `tiers.folder` at once, and as many that write."""

"""Levels: which parts of the model update when. Pure Python; nothing here knows of tensors.

A level with period C updates at the end of every window of C steps (Eq. 70-71 of the
paper; docs/concepts/levels.md):

    theta_l <- theta_l - sum_{t in window} eta_t f(theta_l; x_t)     if i = phase (mod C_l)

A sync group is (level, phase): the parameters that are reduced and stepped together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from nlscale.config.curriculum import curriculum, tokens_per_step
from nlscale.config.parts import parts_of
from nlscale.config.periods import (
    PeriodChanges,
    Piece,
    Stretch,
    changes_of,
    period_caps,
    stretch_of,
    stretches,
)
from nlscale.config.phases import order
from nlscale.config.units import declared_period
from nlscale.config.vocabulary import (
    Config,
    Dtype,
    LevelConfig,
    LevelsConfig,
    OuterConfig,
    PeriodRule,
    Phases,
    Sharding,
    WireFormat,
)
from nlscale.errors import UserError

BLOCK = 128
"""Values that share a scale where a level crosses as integers **[choice]**. The scale's 4 bytes are
3% of a block in int8 and 6% in int4. Of 64 normal values the largest is 2.6 standard deviations, of
128 2.8 and of 256 3.0: half the block would round 8% finer, with 6% more bytes in int4; twice the
block 8% coarser, with 3% fewer."""
INTEGER_BITS = {WireFormat.int8: 8, WireFormat.int4: 4}
"""Of a value of a level that crosses as integers, whose errors of rounding are kept."""
_SCALE = 4 / BLOCK
_BYTES = {
    WireFormat.fp32: 4,
    WireFormat.bf16: 2,
    **{wire: bits / 8 + _SCALE for wire, bits in INTEGER_BITS.items()},
}
"""Of a value on the wire."""
ROUNDED_AT_ONCE = 2**27
"""Bytes of memory that crossing rounded takes in passing, however large a bucket is."""


@dataclass(frozen=True)
class Outer:
    """The outer steps of a level; as `nlscale.config.outer` has them."""

    every: int
    """Updates of a sync group between two of its outer steps."""
    momentum: float
    learning_rate: float


@dataclass(frozen=True)
class Copy:
    """That a level holds a copy of the MLPs of a faster one (`model.cms: nested`)."""

    of_period: int
    """Steps between two updates of those MLPs; the level's period is a multiple of it."""
    rate: float
    """How far the copy goes to the next faster one; as `copy_rate` has it."""


@dataclass(frozen=True)
class Level:
    """A set of parameters that share an update period."""

    index: int
    """Position in the spectrum; 0 is the fastest, and has what no level names as its part."""
    name: str
    period: int
    """Steps between two updates of a parameter of this level; where it changes, the longest."""
    learning_rate: float
    """Factor on the run's learning rate, beside the rule of its period."""
    rule: PeriodRule = PeriodRule.none
    """How that grows with its period."""
    wire: WireFormat = WireFormat.fp32
    """How its gradients cross between nodes; of a local level, what its updates have made."""
    outer: Outer | None = None
    """Its outer steps; None: it makes none."""
    local: bool = False
    """Whether each node updates it by its own gradient, and nothing crosses but at outer steps."""

    changes: PeriodChanges | None = None
    """Of its period in the run; None: it does not change."""
    copy: Copy | None = None
    """What it holds in place of parameters of the model; None: it has parameters."""
    phases: Phases = Phases.by_depth
    """Which block has which of its phases."""

    @property
    def learning_rate_scale(self) -> float:
        """Factor on the run's learning rate: the level's own times the rule of its period."""
        return self.scale_at(self.period)

    def scale_at(self, period: int) -> float:
        """The same of an update whose window has that period."""
        return self.learning_rate * _rule(self.rule, period)

    @property
    def periods(self) -> tuple[Piece, ...]:
        """Those of the run, and where each begins; one where it does not change."""
        return (Piece(0, self.period),) if self.changes is None else self.changes.pieces

    def period_at(self, step: int) -> int:
        """The period of a window that begins with a step, counted from 1."""
        return self.period if self.changes is None else self.changes.period_after(step - 1)

    @property
    def crosses_every(self) -> int:
        """Steps between two of a parameter's crossings between nodes."""
        return self.period * self.updates_a_crossing

    @property
    def updates_a_crossing(self) -> int:
        """Updates of a parameter for each of its crossings."""
        return self.outer.every if self.local and self.outer else 1


@dataclass(frozen=True, order=True)
class SyncGroup:
    """The parameters of one level that update at the same steps."""

    level: int
    phase: int
    """The group updates at the steps i = 1, 2, ... with i = phase (mod period)."""
    period: int
    """Where that of the level changes, the longest; `due` follows the changes."""
    outer_phase: int = 0
    """Of a level that makes an outer step every H updates, the group makes its own with its updates
    j = 1, 2, ... with j = outer phase (mod H)."""
    changes: PeriodChanges | None = field(default=None, compare=False, repr=False)
    """Of the level."""

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Its windows, from the first step of a run on; one stretch where nothing changes."""
        return stretches(self.changes, self.phase, self.period)

    def period_at(self, step: int) -> int:
        """The period of the window that holds a step, counted from 1."""
        return stretch_of(self.stretches, step).period

    def due(self, step: int) -> bool:
        """Whether the group updates at the end of this step, counted from 1."""
        own = stretch_of(self.stretches, step)
        return (step - own.phase) % own.period == 0

    def closes_after(self, step: int) -> int:
        """The step at which the window closes that holds this step, counted from 1, if it is not
        the end of the run that closes it."""
        return stretch_of(self.stretches, step).end_after(step - 1)

    def outer_due(self, step: int, outer: Outer | None) -> bool:
        """Whether the group makes an outer step after its update at this step.

        Args:
            step: counted from 1.
            outer: of its level.
        """
        if outer is None or not self.due(step):
            return False
        return (self.updates(step) - self.outer_phase) % outer.every == 0

    def outer_steps(self, steps: int, level: Level) -> int:
        """How many it makes in a run of that many steps, the mean with which a local one ends
        included."""
        if level.outer is None:
            return 0
        due = self.due_until(steps)
        full = (due - self.outer_phase) // level.outer.every + (self.outer_phase > 0)
        return full + (level.local and not self.outer_due(steps, level.outer))

    def window_tokens(self, step: int, tokens_until: Callable[[int], int]) -> int:
        """Tokens of a period of steps that ends with the next update after a step.

        Before the first step of a run there are as many as at it, so that a first window that the
        phase cuts short does not count as full.

        Args:
            step: counted from 1; after an update at it the window that begins counts.
            tokens_until: of the first steps of the run.
        """
        own = stretch_of(self.stretches, step + 1)
        closes = own.end_after(step)
        return tokens_until(closes) - tokens_until(closes - own.period)

    def due_until(self, step: int) -> int:
        """How often it is due in the first steps of a run."""
        ends = [*(own.begins for own in self.stretches[1:]), step]
        return sum(
            own.ends(own.begins, min(end, step))
            for own, end in zip(self.stretches, ends, strict=True)
            if own.begins < step
        )

    @property
    def mean_period(self) -> float:
        """Steps of the run over those at which it is due."""
        if self.changes is None:
            return self.period
        return self.changes.steps / max(1, self.due_until(self.changes.steps))

    def updates(self, steps: int) -> int:
        """How often it updates in a run of that many steps, the last partial window included."""
        return self.due_until(steps) + (0 if self.due(steps) else 1)


def levels_of(config: Config) -> list[Level]:
    """The levels of a run, with the changes of their periods; see `spectrum`."""
    levels = _with_copies(config, spectrum(config.levels, tokens_per_step(config)))
    longest = max(level.period for level in levels)
    caps = period_caps(config.levels.period_warmup, curriculum(config), longest)
    steps = config.train.steps
    return [replace(level, changes=changes_of(caps, steps, level.period)) for level in levels]


def spectrum(config: LevelsConfig, tokens_per_step: int | None) -> list[Level]:
    """The levels of a configuration, fastest first, periods in steps, as if they never changed.

    Args:
        config: the section.
        tokens_per_step: None: they differ between the stages of the run.

    Raises:
        UserError: no level, a period that is none, two of one name, a level faster than the one
            before it, or a period in tokens where steps differ in them.
    """
    if not config.spectrum:
        raise UserError("levels.spectrum is empty; the simplest is levels=[1]")
    levels: list[Level] = []
    for index, entry in enumerate(config.spectrum):
        declared = declared_period(index, entry)
        if tokens_per_step is None and declared.unit == "tokens":
            raise UserError(
                f"levels.spectrum.{index}.period '{declared}' is in tokens, and the stages of the "
                f"run take different numbers of them a step; give it in steps"
            )
        # where it is None, nothing is counted in tokens
        period = declared.in_steps(tokens_per_step or 1)
        if any(entry.name == level.name for level in levels):
            raise UserError(f"levels.spectrum.{index}.name: {entry.name!r} is taken; rename one")
        if levels and period < levels[-1].period:
            raise UserError(
                f"levels.spectrum.{index}: period {period} steps is shorter than "
                f"{levels[-1].name!r}'s {levels[-1].period}; list the fastest level first"
            )
        rate, rule, outer = entry.learning_rate, config.learning_rate_rule, _outer(index, entry)
        own = Level(index, entry.name, period, rate, rule, entry.wire, outer, entry.local)
        levels.append(replace(own, phases=config.phases))
    return levels


def _with_copies(config: Config, levels: list[Level]) -> list[Level]:
    """Of the levels that hold copies, what they are copies of.

    Raises:
        UserError: a window of a copy does not end with one of the next faster level; or a level
            without a copy has a rate of one.
    """
    parts = parts_of(config)
    for index, entry in enumerate(config.levels.spectrum):
        if index not in parts.copies and entry.copy_rate != LevelConfig.copy_rate:
            raise UserError(
                f"levels.spectrum.{index}.copy_rate is {entry.copy_rate:g}, and level "
                f"{entry.name!r} holds no copy: with model.cms=nested all levels with cms but the "
                f"first do; leave it out"
            )
    if not parts.copies:
        return levels
    found = [*levels]
    chain = [levels[index] for index in (parts.mlps[0], *parts.copies)]
    for faster, level in pairwise(chain):
        if level.period % faster.period or level.period == faster.period:
            raise UserError(
                f"levels.spectrum.{level.index}: period {level.period} steps is not a multiple, "
                f"twice or more, of the {faster.period} of level {faster.name!r}, and it holds a "
                f"copy of what that becomes (model.cms=nested); give it {_near(level, faster)}"
            )
        rate = config.levels.spectrum[level.index].copy_rate
        found[level.index] = replace(level, copy=Copy(chain[0].period, rate))
    return found


def _near(level: Level, faster: Level) -> str:
    """Periods near that of a level that are multiples of a faster one's."""
    times = level.period // faster.period
    near = {max(2, times) * faster.period, max(2, times + 1) * faster.period}
    return " or ".join(f"{period:,} steps" for period in sorted(near))


def _outer(index: int, entry: LevelConfig) -> Outer | None:
    """The outer steps of a level of the spectrum.

    Raises:
        UserError: it is local and makes none, or their numbers are given and not how often.
    """
    own, key = entry.outer, f"levels.spectrum.{index}"
    if own.every is not None:
        return Outer(own.every, own.momentum, own.learning_rate)
    if entry.local:
        raise UserError(
            f"{key}.local: each node goes its own way until an outer step, and {key}.outer.every "
            f"is null, which makes none; give it a number of updates, such as 30"
        )
    if own != OuterConfig():
        raise UserError(
            f"{key}.outer has a momentum of {own.momentum:g} and a learning_rate of "
            f"{own.learning_rate:g}, and {key}.outer.every is null, which makes no outer step; "
            f"give it a number of updates, such as 30"
        )
    return None


def reduction_bytes(
    parameters: float,
    nodes: int,
    wire: WireFormat = WireFormat.fp32,
    gathered: int | None = None,
) -> float:
    """Bytes that leave a node when the gradient of that many parameters crosses the network once.

    Each node sends (n - 1) / n of a value's bytes twice: its part of every sum to the node that
    adds it up, and of its own sums one to each other node. A ring all-reduce sends as much. Where
    the node that adds up updates the parameter too, it sends that in place of the sum.

    Args:
        parameters: whose gradient crosses.
        nodes: over which it is summed.
        wire: how.
        gathered: bytes of an updated parameter, see `gathered_bytes`; None: sums come back.
    """
    return (nodes - 1) / nodes * sent_bytes(wire, gathered) * parameters


def sent_bytes(wire: WireFormat, gathered: int | None = None) -> float:
    """Bytes of a value that crosses, there and back; `gathered` as of `reduction_bytes`."""
    return _BYTES[wire] + (_BYTES[wire] if gathered is None else gathered)


def gathered_bytes(config: Config) -> int | None:
    """Bytes of an updated parameter as the nodes send it to each other; None: they need not."""
    if config.parallel.shard_optimizer == Sharding.node:
        return None
    return 2 if config.train.dtype == Dtype.bf16 else 4


def phase(level: Level, depth: int, layers: int, stagger: bool) -> int:
    """The phase of a level in the block at that depth, in steps.

    Staggered, the blocks of a stack divide the time between two crossings evenly among themselves:
    the period, and of a local level that between two outer steps. Unstaggered, all cross together.
    It depends on depth alone, never on the cluster, so that the same run on other hardware makes
    the same updates. A copy, which does not cross, counts the updates of what it is a copy of: its
    windows end with theirs, and the first has as many of them as every other.
    """
    if not stagger:
        return 0
    place = order(depth, layers, level.phases)
    if level.copy is not None:
        own = place * level.copy.of_period // layers
        return own and own + level.period - level.copy.of_period
    return place * level.crosses_every // layers


def sync_group(level: Level, depth: int, layers: int, stagger: bool) -> SyncGroup:
    """The sync group of a level's parameters in the block at that depth."""
    periods, own = divmod(phase(level, depth, layers, stagger), level.period)
    # Counted by updates: a window that the phase cuts short ends with one too.
    outer_phase = (periods + (own > 0)) % level.updates_a_crossing
    return SyncGroup(level.index, own, level.period, outer_phase, level.changes)


def mean_period(level: Level, layers: int, stagger: bool) -> float:
    """Steps over updates, the mean over the blocks."""
    if level.changes is None:
        return level.period
    groups = [sync_group(level, depth, layers, stagger) for depth in range(layers)]
    return layers / sum(1 / group.mean_period for group in groups)


def planned_outer_steps(config: Config, level: Level) -> int:
    """Outer steps of a level in a run: of that of its sync groups that makes most."""
    return max(
        group.outer_steps(config.train.steps, level) for group in groups_of_level(config, level)
    )


def planned_updates(config: Config, level: Level) -> int:
    """Updates of a level in a run: of that of its sync groups that makes most."""
    steps, groups = config.train.steps, groups_of_level(config, level)
    if level.copy is not None:  # the end of the run cuts no window of a copy short
        return max(group.due_until(steps) for group in groups)
    return max(group.updates(steps) for group in groups)


def groups_of_level(config: Config, level: Level) -> set[SyncGroup]:
    """Those that have parameters of a level."""
    layers, stagger = config.model.layers, config.levels.stagger
    depths = parts_of(config).depths(level.index, layers)
    return {sync_group(level, depth, layers, stagger) for depth in depths}


def periods_to_plain(periods: Sequence[Piece]) -> dict[str, Any]:
    """Of a level, for JSON: the longest it has in the run, and all of them."""
    return {
        "period_steps": max(own.period for own in periods),
        "periods": [{"from_step": own.begins + 1, "period_steps": own.period} for own in periods],
    }


def said_periods(periods: Iterable[int]) -> str:
    """Such as "8", or "1 to 8"."""
    ends = sorted({*periods})
    return f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}"


def _rule(rule: PeriodRule, period: int) -> float:
    return {PeriodRule.none: 1.0, PeriodRule.sqrt: period**0.5, PeriodRule.linear: period}[rule]

"""Levels: which parts of the model update when. Pure Python; nothing here knows of tensors.

A level with period C updates at the end of every window of C steps (Eq. 70-71 of the
paper; docs/concepts/levels.md):

    theta_l <- theta_l - sum_{t in window} eta_t f(theta_l; x_t)     if i = phase (mod C_l)

A sync group is (level, phase): the parameters that are reduced and stepped together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nlscale.config.curriculum import tokens_per_step
from nlscale.config.parts import parts_of
from nlscale.config.units import declared_period
from nlscale.config.vocabulary import (
    Config,
    Dtype,
    LevelsConfig,
    PeriodRule,
    Sharding,
    WireFormat,
)
from nlscale.errors import UserError

_BYTES = {WireFormat.fp32: 4, WireFormat.bf16: 2}
"""Of a value on the wire."""
BF16_AT_ONCE = 2**27
"""Bytes of memory that crossing in bf16 takes in passing, however large a bucket is."""
FEW_UPDATES = 200
"""A slow level that updates less often than this in a run is warned about."""


@dataclass(frozen=True)
class Level:
    """A set of parameters that share an update period."""

    index: int
    """Position in the spectrum; 0 is the fastest, and has what no level names as its part."""
    name: str
    period: int
    """Steps between two updates of a parameter of this level."""
    learning_rate_scale: float
    """Factor on the run's learning rate: the level's own times the rule of its period."""
    wire: WireFormat = WireFormat.fp32
    """How its gradients cross between nodes."""


@dataclass(frozen=True, order=True)
class SyncGroup:
    """The parameters of one level that update at the same steps."""

    level: int
    phase: int
    """The group updates at the steps i = 1, 2, ... with i = phase (mod period)."""
    period: int

    def due(self, step: int) -> bool:
        """Whether the group updates at the end of this step, counted from 1."""
        return (step - self.phase) % self.period == 0

    def window_tokens(self, step: int, tokens_until: Callable[[int], int]) -> int:
        """Tokens of a period of steps that ends with the next update after a step.

        Before the first step of a run there are as many as at it, so that a first window that the
        phase cuts short does not count as full.

        Args:
            step: counted from 1; after an update at it the window that begins counts.
            tokens_until: of the first steps of the run.
        """
        closes = step + self.period - (step - self.phase) % self.period
        return tokens_until(closes) - tokens_until(closes - self.period)

    def updates(self, steps: int) -> int:
        """How often it updates in a run of that many steps, the last partial window included."""
        first = self.phase or self.period
        full = 0 if steps < first else (steps - first) // self.period + 1
        return full + (0 if self.due(steps) else 1)


def levels_of(config: Config) -> list[Level]:
    """The levels of a run; see `spectrum`."""
    return spectrum(config.levels, tokens_per_step(config))


def spectrum(config: LevelsConfig, tokens_per_step: int | None) -> list[Level]:
    """The levels of a configuration, fastest first, periods in steps.

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
        scale = entry.learning_rate * _rule(config.learning_rate_rule, period)
        levels.append(Level(index, entry.name, period, scale, entry.wire))
    return levels


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


def sent_bytes(wire: WireFormat, gathered: int | None = None) -> int:
    """Bytes of a value that crosses, there and back; `gathered` as of `reduction_bytes`."""
    return _BYTES[wire] + (_BYTES[wire] if gathered is None else gathered)


def gathered_bytes(config: Config) -> int | None:
    """Bytes of an updated parameter as the nodes send it to each other; None: they need not."""
    if config.parallel.shard_optimizer == Sharding.node:
        return None
    return 2 if config.train.dtype == Dtype.bf16 else 4


def phase(level: Level, depth: int, layers: int, stagger: bool) -> int:
    """The phase of a level in the block at that depth.

    Staggered, the blocks of a stack divide the period evenly among themselves; unstaggered, all
    update together. It depends on depth alone, never on the cluster, so that the same run on
    other hardware makes the same updates.
    """
    return depth * level.period // layers if stagger else 0


def sync_group(level: Level, depth: int, layers: int, stagger: bool) -> SyncGroup:
    """The sync group of a level's parameters in the block at that depth."""
    return SyncGroup(level.index, phase(level, depth, layers, stagger), level.period)


def planned_updates(config: Config, level: Level) -> int:
    """Updates of a level in a run: of that of its sync groups that makes most."""
    layers, stagger = config.model.layers, config.levels.stagger
    depths = parts_of(config).depths(level.index, layers)
    groups = {sync_group(level, depth, layers, stagger) for depth in depths}
    return max(group.updates(config.train.steps) for group in groups)


def slow_level_warnings(config: Config, levels: list[Level]) -> list[str]:
    """A line for each level that will hardly learn, because it updates too rarely in the run."""
    lines, steps = [], config.train.steps
    for level in levels:
        updates = planned_updates(config, level)
        if level.period > 1 and updates < FEW_UPDATES:
            lines.append(
                f"level {level.name!r} makes {updates} updates in {steps} steps, fewer than "
                f"{FEW_UPDATES}: it will learn little; train longer or shorten its period"
            )
    return lines


def approximate(levels: list[Level], crosses: bool) -> list[str]:
    """A line for each level whose updates are not those that one node would make."""
    return [
        f"level {level.name!r} crosses between nodes in {level.wire.value}: its updates are "
        f"approximate, and depend on the number of nodes"
        for level in levels
        if crosses and level.wire != WireFormat.fp32
    ]


def _rule(rule: PeriodRule, period: int) -> float:
    return {PeriodRule.none: 1.0, PeriodRule.sqrt: period**0.5, PeriodRule.linear: period}[rule]

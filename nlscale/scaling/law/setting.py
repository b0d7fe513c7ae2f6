"""What of a run's levels decides what it sends between nodes, and when, in a few words."""

from __future__ import annotations

from collections.abc import Sequence

from nlscale.config.outer import OuterConfig
from nlscale.config.parts import parts_of
from nlscale.config.period_warmup import PeriodWarmupConfig
from nlscale.config.vocabulary import Config, Phases, Reduction, WireFormat
from nlscale.levels.spectrum import Level
from nlscale.model.sizes import level_hidden


def setting_of(config: Config, levels: Sequence[Level]) -> str:
    """The short name of a setting.

    Periods in steps, and each thing that is not as always: parts, widths of MLPs, local or outer
    steps, copies, wire. What holds for every level is said once after the last ("1, 4, 16 int8");
    where levels differ in it, each says its own after a semicolon ("1 int8; 4 int8; 16 int4").
    What is of all levels, such as periods that change, follows a "+".

    Args:
        config: of the run.
        levels: as `levels_of` gives them.
    """
    parts = parts_of(config)
    each = said_of_periods(
        [level.period for level in levels],
        [[part.value for part in parts.of_level(level.index)] for level in levels],
    )
    if len(levels) == 1 and levels[0].local and levels[0].period == 1:
        each = ["all"]
    widths = _widths(config)
    each = [f"{own}{width}" for own, width in zip(each, widths, strict=True)]
    wires = [level.wire for level in levels]
    # fp32 goes without saying only where nothing else is there
    named = any(wire != WireFormat.fp32 for wire in wires)
    ways = [_steps(level) + (f" {level.wire.value}" if named else "") for level in levels]
    if len(set(ways)) == 1:
        text = ", ".join(each) + ways[0]
    else:
        text = "; ".join(own + way for own, way in zip(each, ways, strict=True))
    if config.levels.reduction == Reduction.every_step:
        text += " + reduced every step"
    if not config.levels.stagger and any(level.crosses_every > 1 for level in levels):
        text += " + unstaggered"
    elif config.levels.phases != Phases.by_depth and any(each.crosses_every > 1 for each in levels):
        text += f" + {config.levels.phases.value}"
    return text + _changes(config.levels.period_warmup)


def said_of_periods(periods: Sequence[int], parts: Sequence[Sequence[str]]) -> list[str]:
    """The period of each level, and where that is not as always, which parts it has.

    Args:
        periods: in steps.
        parts: of each level, in their order; all empty where nothing is known of them.
    """
    plain = [str(period) for period in periods]
    always = [["cms", "mixer", "embedding", "head"], *(["cms"] for _ in periods[1:])]
    if not any(parts) or [list(own) for own in parts] == always:
        return plain
    return [f"{period} {'+'.join(own)}" for period, own in zip(plain, parts, strict=True)]


def _widths(config: Config) -> list[str]:
    """What is said of each level's MLP, where levels give widths of their own that differ."""
    hidden = level_hidden(config)
    given = any(level.hidden is not None for level in config.levels.spectrum)
    if not given or len({width for width in hidden if width}) < 2:
        return [""] * len(hidden)
    return [f" hidden {width}" if width else "" for width in hidden]


def _steps(level: Level) -> str:
    if level.copy is not None:
        return f" copy (rate {level.copy.rate:g})"
    if level.outer is None:
        return ""
    text = f" {'local' if level.local else 'outer'} every {level.outer.every}"
    usual, own = OuterConfig(), level.outer
    if (own.momentum, own.learning_rate) != (usual.momentum, usual.learning_rate):
        text += f" (momentum {own.momentum:g}, rate {own.learning_rate:g})"
    return text


def _changes(warmup: PeriodWarmupConfig) -> str:
    text = ""
    if warmup.steps is not None:
        text += f" + warm-up {warmup.steps}"
    if warmup.critical_batch:
        batches = ", ".join(str(entry.tokens) for entry in warmup.critical_batch)
        text += f" + critical batch {batches} (share {warmup.share:g})"
    if warmup.cooldown is not None:
        text += f" + cool-down {warmup.cooldown}"
    return text

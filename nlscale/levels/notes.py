"""What is to be said of a run's levels before it begins, in lines for a person. No tensors."""

from __future__ import annotations

from nlscale.config.vocabulary import Config, WireFormat
from nlscale.levels.spectrum import INTEGER_BITS, Level, groups_of_level, planned_updates

FEW_UPDATES = 200
"""A slow level that updates less often than this in a run is warned about."""


def slow_level_warnings(config: Config, levels: list[Level]) -> list[str]:
    """A line for each level that will hardly learn, because it updates too rarely in the run, and
    for each whose outer steps come too late for it."""
    lines, steps = [], config.train.steps
    for level in levels:
        updates = planned_updates(config, level)
        if level.copy is not None:
            if not updates:
                lines.append(
                    f"level {level.name!r} holds a copy that is due after {level.period:,} steps, "
                    f"and the run has {steps:,}: it changes nothing; train longer, or shorten its "
                    f"period"
                )
            continue
        if level.period > 1 and updates < FEW_UPDATES:
            lines.append(
                f"level {level.name!r} makes {updates} updates in {steps} steps, fewer than "
                f"{FEW_UPDATES}: it will learn little; train longer or shorten its period"
            )
        due = max(group.due_until(steps) for group in groups_of_level(config, level))
        if level.outer is not None and due < level.outer.every:
            lines.append(
                f"level {level.name!r} has an outer step every {level.outer.every:,} updates, and "
                f"{due:,} are due in {steps:,} steps; train longer, or give a smaller outer.every"
            )
    return lines


def period_notes(levels: list[Level]) -> list[str]:
    """A line for each level whose period changes in the run."""
    lines = []
    for level in levels:
        if level.changes is not None:
            first, *later = level.changes.pieces
            then = "".join(f", {own.period:,} from step {own.begins + 1:,}" for own in later)
            lines.append(f"the period of level {level.name!r} is {first.period:,}{then}")
    return lines


def approximate(levels: list[Level], crosses: bool) -> list[str]:
    """Lines for each level whose updates are not those that one node would make."""
    return [line for level in levels for line in why_approximate(level, levels, crosses)]


def why_approximate(level: Level, levels: list[Level], crosses: bool) -> list[str]:
    """Lines that say why the updates of a level are not those that one node would make."""
    if not crosses:
        return []
    lines = []
    drifting = ", ".join(repr(level.name) for level in levels if level.local)
    if level.local and level.outer is not None:
        lines.append(
            f"level {level.name!r} is local, each node makes {level.outer.every} updates of "
            f"its own before an outer step: it is approximate, and depends on the number of "
            f"nodes"
        )
    elif drifting:
        lines.append(
            f"level {level.name!r} takes its gradients where the nodes' weights differ in "
            f"{drifting}: it is approximate, and depends on the number of nodes"
        )
    if level.wire != WireFormat.fp32:
        lines.append(
            f"level {level.name!r} crosses between nodes in {level.wire.value}"
            f"{_feedback(level)}: its updates are approximate, and depend on the number of "
            f"nodes"
        )
    return lines


def _feedback(level: Level) -> str:
    return " with error feedback" if level.wire in INTEGER_BITS else ""

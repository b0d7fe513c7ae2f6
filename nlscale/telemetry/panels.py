"""What evaluations found while runs trained, as panels below the loss of a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHANCE = "chance"
"""What an evaluation calls the score of guesses: a line to compare with, no panel."""
HEIGHT = 1.7
"""Of a panel, in inches."""
STEP, TOKENS = 0, 1
"""What a panel is drawn over: a place in a `Point`."""
_MOST_PANELS, _MOST_LINES = 8, 8
_ENOUGH = 3
"""Steps after the first tenth of a run, by which a panel can be scaled."""
_UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte", "accuracy": "share right"}
"""Of what the evaluations of this package find; anything else stands for itself."""

Point = tuple[int, float, float]
"""Step, tokens seen, value."""
Lines = dict[str, list[Point]]


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[Point]]
    chances: Sequence[float] = ()
    """What guesses reach."""


def panels_of(records: Iterable[Mapping[str, Any]]) -> tuple[list[Panel], int]:
    """The panels of a run: one for the figures of an evaluation that have a last word in common.

    `0-16/loss` and `16-64/loss` are lines of one panel, `bits_per_byte` is another.

    Args:
        records: of metrics.jsonl, of any kind. Figures that are floats are drawn.

    Returns:
        Panels in the order of the records, and how many figures are too many to be read, and so
        left out.
    """
    found: dict[tuple[str, str], Lines] = {}
    chances: dict[str, list[float]] = {}
    for evaluation, figure, point in _figures(records):
        if figure == CHANCE:
            chances[evaluation] = [point[2]]
            continue
        line, _, quantity = figure.rpartition("/")
        found.setdefault((evaluation, quantity), {}).setdefault(line, []).append(point)
    return _panels(found, chances)


def panels_of_runs(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> tuple[list[Panel], int]:
    """The panels of several runs: one a figure, with a line for each run that has it.

    Args:
        runs: records by label.

    Returns:
        As of `panels_of`, but that all runs are drawn.
    """
    found: dict[tuple[str, str], Lines] = {}
    chances: dict[str, list[float]] = {}
    for label, records in runs.items():
        for evaluation, figure, point in _figures(records):
            if figure != CHANCE:
                lines = found.setdefault((evaluation, figure), {})
                lines.setdefault(label, []).append(point)
            elif point[2] not in chances.setdefault(evaluation, []):
                chances[evaluation].append(point[2])
    return _panels(found, chances, most_lines=len(runs))


def rows_of(figure: Any, heights: list[float]) -> list[Any]:
    """Axes above each other over one axis of steps or tokens; heights in inches."""
    figure.set_size_inches(8.0, sum(heights))
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    for above in rows[:-1, 0]:
        above.tick_params(axis="x", bottom=False, labelbottom=False)
    return list(rows[:, 0])


def draw_panel(axes: Any, panel: Panel, over: int, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a panel, and name its lines above it: those whose style has a label.

    Args:
        axes: matplotlib's.
        panel: what to draw.
        over: STEP or TOKENS.
        styles: how each line is drawn, by its name.
    """
    for name, points in panel.lines.items():
        x, y = [point[over] for point in points], [point[2] for point in points]
        axes.plot(x, y, **{"marker": "o", "markersize": 3, "linewidth": 1.2, **styles[name]})
    for chance in panel.chances:
        axes.axhline(
            chance, color="#8C8C8C", linestyle=(0, (5, 3)), linewidth=1.2,
            label=f"{CHANCE}: {chance:.4g}",
        )  # fmt: skip
    axes.set_title(panel.title, loc="left", fontsize=9.5)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.spines["top"].set_visible(False)
    axes.set_ylim(*_limits(panel))
    axes.grid(axis="y")
    if not axes.get_legend_handles_labels()[0]:  # lines that the figure names elsewhere
        return
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=4, frameon=False, fontsize=8.5,
        handlelength=1.4, columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def draw_panel_of_run(axes: Any, panel: Panel, colours: Sequence[str]) -> None:
    """Draw a panel over steps, the last value of each line above it."""
    styles = {
        name: {
            "color": colours[index % len(colours)],
            "linestyle": ("-", "--")[index // len(colours) % 2],
            "label": f"{name or 'last'}: {points[-1][2]:.4g}",
        }
        for index, (name, points) in enumerate(panel.lines.items())
    }
    draw_panel(axes, panel, STEP, styles)


def _limits(panel: Panel) -> tuple[float, float]:
    """Of the axis of values.

    Where lines are to be told apart, what all of them do in the first tenth of the run may lie
    outside, if it takes half of the axis or more: a loss falls so far there that they would be one
    line from then on.
    """
    points = [point for line in panel.lines.values() for point in line]
    last = max(point[STEP] for point in points)
    later = [point for point in points if point[STEP] > 0.1 * last]
    whole, end = _span(points, panel.chances), _span(later, panel.chances)
    apart = len(panel.lines) > 1 and len({point[STEP] for point in later}) >= _ENOUGH
    low, high = end if apart and end[1] - end[0] < (whole[1] - whole[0]) / 2 else whole
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def _span(points: Sequence[Point], more: Sequence[float]) -> tuple[float, float]:
    values = [*(point[2] for point in points), *more]
    return min(values, default=0.0), max(values, default=0.0)


def left_out(count: int) -> str:
    """A line to put below a figure."""
    return f"\n{count} more figures are in metrics.jsonl" if count else ""


def _figures(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, Point]]:
    """Evaluation, name and value of each that is a number."""
    for record in records:
        evaluation, tokens = record.get("name"), record.get("tokens")
        if record.get("kind") != "evaluation" or evaluation is None:
            continue
        for name, value in record.items():
            if name in ("time", "seconds") or not isinstance(value, float):
                continue
            if math.isfinite(value):
                yield evaluation, name, (int(record["step"]), float(tokens or 0), value)


def _panels(
    found: Mapping[tuple[str, str], Lines],
    chances: dict[str, list[float]],
    most_lines: int = _MOST_LINES,
) -> tuple[list[Panel], int]:
    panels = []
    for (evaluation, name), lines in list(found.items())[:_MOST_PANELS]:
        quantity = name.rpartition("/")[2]
        unit = _UNITS.get(quantity, quantity.replace("_", " "))
        kept = dict(list(lines.items())[:most_lines])
        # beside an evaluation's first figure alone: guesses say nothing of the others
        beside = chances.pop(evaluation, [])
        title = evaluation if evaluation == name else f"{evaluation}: {name.replace('_', ' ')}"
        panels.append(Panel(title, unit, kept, beside))
    drawn = sum(len(panel.lines) for panel in panels)
    return panels, sum(map(len, found.values())) - drawn

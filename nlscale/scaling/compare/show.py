"""A comparison as a person reads it: a table, and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.config.units import human_bytes, human_count
from nlscale.scaling.compare.answer import Answer
from nlscale.scaling.compare.comparison import Comparison, Contrast
from nlscale.scaling.compare.runs import Cell
from nlscale.telemetry.figures import save_figure

_SHOWN_KEYS = 6
_LONG = 24
"""Characters. Values beyond it, such as patterns of mixers, are named by a letter."""
_MOST_PAIRS = 8
"""Whose numbers a table has each; of more, the lowest and the highest."""
_STYLES = {"undecided": "yellow"}
# Okabe-Ito: told apart with every common form of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def to_plain(found: Answer) -> dict[str, Any]:
    """As JSON holds it: a comparison, or under `each` one by the value that sets them apart."""
    if set(found.tables) == {""}:
        return found.tables[""].to_plain()
    return {"each": {value: one.to_plain() for value, one in found.tables.items()}}


def print_answer(found: Answer, out: Console) -> None:
    """Print one table after the other."""
    for value, one in found.tables.items():
        if value:
            out.print(f"{value}:", style="bold")
        print_comparison(one, out)
        if value:
            out.print()


class _Names:
    """What the values of factors are called: as they are, or by a letter that stands for them."""

    def __init__(self, one: Comparison) -> None:
        values = dict.fromkeys(value for cell in one.grid.cells for value in cell)
        long = [value for value in values if len(value) > _LONG]
        self._letters = {
            value: f"{chr(ord('A') + at % 26)}{at // 26 or ''}" for at, value in enumerate(long)
        }
        self.legend = [f"{letter}: {value}" for value, letter in self._letters.items()]

    def of(self, values: Iterable[str]) -> list[str]:
        return [self._letters.get(value, value) for value in values]


def print_comparison(one: Comparison, out: Console) -> None:
    """Print cells, contrasts, and what one should know of them."""
    grid, names = one.grid, _Names(one)
    by = " and ".join(grid.paired_by)
    pairs = len(grid.pairs)
    out.print(f"{one.metric} of {pairs} {'pair' if pairs == 1 else 'pairs'} by {by}")
    out.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for factor in grid.factors:
        table.add_column(factor, no_wrap=True)
    each = pairs <= _MOST_PAIRS
    for name in (" ".join(pair) for pair in grid.pairs) if each else ("lowest", "highest"):
        table.add_column(name, justify="right")
    for name in ("mean", "parameters", "tokens", "s/step", "state"):
        table.add_column(name, justify="right")
    for cell in grid.cells:
        values = grid.values(cell)
        run = grid.runs[cell][grid.pairs[0]]
        shown = values if each else [min(values), max(values)]
        numbers = [*shown, sum(values) / len(values)]
        seconds, state = one.seconds_per_step(cell), run.state_bytes
        counts = (
            human_count(run.parameters),
            human_count(run.tokens),
            "-" if seconds is None else f"{seconds:.3g}",
            "-" if state is None else human_bytes(state),
        )
        table.add_row(*names.of(cell), *(f"{x:.4f}" for x in numbers), *counts)
    out.print(table)
    out.print()
    if names.legend:
        out.print("\n".join(names.legend), end="\n\n", soft_wrap=True)
    for contrast in one.contrasts:
        verdict = contrast.paired.verdict
        said = _sentence(contrast, names, one.effect)
        out.print(said, style=_STYLES.get(verdict, "bold"), soft_wrap=True)
    for line in (*one.unequal, *grid.left_out, *_also(one, names)):
        out.print(line, style="yellow", soft_wrap=True)


def _sentence(contrast: Contrast, names: _Names, effect: float | None) -> str:
    """A contrast in words: difference, interval, verdict, and what more pairs would show."""
    found = contrast.paired
    over = f" (mean over {contrast.over})" if contrast.over else ""
    value, baseline = names.of((contrast.value, contrast.baseline))
    text = f"{value} - {baseline}{over}: {found.mean:+.4f}"
    if found.interval is None:
        return f"{text}, undecided: one pair says nothing of how far seeds differ; run more"
    text += f" [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]"
    if found.resampled is not None:
        text += f", bootstrap [{found.resampled[0]:+.4f}, {found.resampled[1]:+.4f}]"
    text += f", {found.verdict}"
    visible = found.visible()
    if visible is not None:
        text += f"; {len(found.differences)} pairs show {visible:.2g} or more"
    if effect is not None:
        wanted, have = found.pairs_for(effect), len(found.differences)
        if wanted is None:
            text += f"; {effect:g} would take more pairs than anyone runs"
        elif wanted > have:
            text += f"; {effect:g} would take {wanted - have} more"
        else:
            text += f"; enough for {effect:g}"
    return text


def _also(one: Comparison, names: _Names) -> list[str]:
    """What differs beside the factors: a difference may be of these as well."""
    lines = []
    for key, by_cell in list(one.grid.also.items())[:_SHOWN_KEYS]:
        said = ", ".join(
            f"{' '.join(names.of(cell))} {'/'.join(of)}" for cell, of in by_cell.items()
        )
        lines.append(f"differs as well: {key}: {said}")
    more = len(one.grid.also) - _SHOWN_KEYS
    if more > 0:
        lines.append(f"and {more} more keys differ (--json names them)")
    return lines


def draw_answer(found: Answer, out: Path) -> Path:
    """Draw a row for each table: pairs as lines through the cells, contrasts with intervals."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}
    tables = found.tables
    with rc_context(style):
        rows = [max(len(one.grid.cells), len(one.contrasts)) for one in tables.values()]
        legend = list(dict.fromkeys(line for one in tables.values() for line in _Names(one).legend))
        height = 0.7 + sum(1.3 + 0.34 * count for count in rows) + 0.2 * len(legend)
        figure = Figure(figsize=(10.0, height), dpi=160, layout="constrained")
        panels = figure.subplots(len(tables), 2, squeeze=False)
        for (left, right), (value, one) in zip(panels, tables.items(), strict=True):
            _draw_cells(left, one, one.grid.cells)
            _draw_contrasts(right, one)
            if value:
                left.set_title(value, fontsize=10, loc="left", fontweight="bold")
        one = next(iter(tables.values()))
        panels[-1][0].set_xlabel(f"{one.metric} (a line joins a pair; bars are means)")
        panels[-1][1].set_xlabel("difference, intervals of all together; grey: undecided")
        pairs = len(one.grid.pairs)
        figure.suptitle(
            f"{one.metric}, {pairs} {'pair' if pairs == 1 else 'pairs'} by "
            f"{' and '.join(one.grid.paired_by)}",
            x=0.02, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        if legend:
            figure.supxlabel("\n".join(legend), x=0.02, ha="left", fontsize=8)
        return save_figure(figure, out)


def _draw_cells(axes: Any, one: Comparison, cells: list[Cell]) -> None:
    places = range(len(cells))
    for pair in zip(*map(one.grid.values, cells), strict=True):
        axes.plot(pair, places, color="#C8C8C8", linewidth=1.0, zorder=1)
    for place, cell in enumerate(cells):
        values = one.grid.values(cell)
        colour = _COLOURS[place % len(_COLOURS)]
        axes.scatter(values, [place] * len(values), color=colour, s=22, zorder=2)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [place - 0.25, place + 0.25], color=colour, linewidth=2.2)
    axes.set_yticks(list(places), [" ".join(_Names(one).of(cell)) for cell in cells])
    axes.invert_yaxis()
    axes.margins(y=0.15)


def _draw_contrasts(axes: Any, one: Comparison) -> None:
    axes.axvline(0.0, color="#8C8C8C", linewidth=1.0)
    for place, contrast in enumerate(one.contrasts):
        found = contrast.paired
        decided = found.verdict != "undecided"
        colour = "#0072B2" if decided else "#8C8C8C"
        axes.scatter(
            found.differences, [place] * len(found.differences), color=colour, s=12, alpha=0.5
        )
        if found.interval is not None and all(map(math.isfinite, found.interval)):
            axes.plot(found.interval, [place, place], color=colour, linewidth=2.0)
        axes.plot([found.mean], [place], "D", color=colour, markersize=6)
    names = _Names(one)
    sides = ["\n- ".join(names.of((c.value, c.baseline))) for c in one.contrasts]
    axes.set_yticks(range(len(sides)), sides)
    axes.invert_yaxis()
    axes.margins(y=0.3)

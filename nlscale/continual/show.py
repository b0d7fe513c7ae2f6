"""The results of a stream as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.continual.matrix import FIGURES
from nlscale.continual.stream import Stream
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import Status


def print_runs(stream: Stream, runs: list[Run], states: Mapping[str, Status], out: Console) -> None:
    """Print what there is to be trained, and how far it is."""
    ends = ", ".join(
        f"{name} to step {end:,}" for name, end in zip(stream.tasks, stream.ends, strict=True)
    )
    out.print(f"{stream.path}: {len(runs)} runs in {stream.sweep.folder}", soft_wrap=True)
    out.print(f"tasks: {ends}; measured: {stream.metric.label}", soft_wrap=True)
    table = _table()
    for column in ("run", "method", "tokens", "task", "state"):
        table.add_column(column, no_wrap=column != "method")
    for run in runs:
        state = states[run.name]
        done = sum(end <= state.step for end in stream.ends)
        at = "-" if state.finished else f"{min(done + 1, len(stream.ends))}/{len(stream.ends)}"
        made = stream.helps[run.axes["method"]]
        table.add_row(run.name, made, f"{run.tokens:,}", at, state.word)
    out.print(table)


def print_results(stream: Stream, plain: Mapping[str, Any], out: Console) -> None:
    """Print the matrix of each method, the table of all, and how they differ from the baseline."""
    methods = plain["methods"]
    for name, found in methods.items():
        seeds = len(found["seeds"])
        table = _table(f"{name}, {stream.metric.label}" + f", mean of {seeds} seeds" * (seeds > 1))
        table.add_column("after", no_wrap=True)
        for task in stream.tasks:
            table.add_column(task, justify="right", no_wrap=True)
        table.add_row("nothing", *map(_figure, found["before"]))
        for task, row in zip(stream.tasks, found["matrix"], strict=True):
            table.add_row(task, *map(_figure, row))
        out.print(table)
        out.print()
    out.print(_figures(methods, "figures"))
    better = "higher" if stream.metric.higher else "lower"
    out.print(
        f"{stream.metric.label}, {better} is better; 95% intervals over seeds, where there are "
        f"several.",
        soft_wrap=True,
    )
    paired = {name: found for name, found in methods.items() if _paired(found)}
    if paired:
        out.print()
        out.print(_figures(paired, "against", f"less those of {plain['baseline']}, seed by seed"))


def _paired(found: Mapping[str, Any]) -> bool:
    """Whether a method shares more than one seed with the baseline."""
    return bool(found["against"]) and found["against"]["average"]["seeds"] > 1


def _figures(methods: Mapping[str, Any], key: str, title: str | None = None) -> Table:
    table = _table(title)
    table.add_column("method", no_wrap=True)
    for heading in FIGURES.values():
        table.add_column(heading, justify="right")
    for name, found in methods.items():
        table.add_row(name, *(_with_interval(found[key][figure]) for figure in FIGURES))
    return table


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _with_interval(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return _figure(found["mean"])
    low, high = found["interval"]
    return f"{_figure(found['mean'])} ± {_figure((high - low) / 2)}"

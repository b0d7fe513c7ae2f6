"""The figure of loss against what a training sends between nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes, human_count
from nlscale.scaling.law.network import Saving, Sent, alike, by_period, savings
from nlscale.scaling.show.figure import COLOURS, STYLE, legend_below
from nlscale.telemetry.figures import save_figure

_MARKERS = "os^Dv<>"
_MOST_LABELS = 8


def draw_network(runs: list[Sent], cluster: Cluster, out: Path) -> Path:
    """Draw loss over the bytes a node sends in the training, and the frontier of the two.

    A colour is a setting of the periods, a marker a family; runs that differ in their periods
    alone are joined by a line. Where there are such, another panel shows what each setting saves
    and costs beside the one that sends most.

    Args:
        runs: as `sent_on` gives them.
        cluster: on which.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    saved = savings(runs)
    tints = {periods: COLOURS[i % len(COLOURS)] for i, periods in enumerate(by_period(runs))}
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5 if saved else 8.0, 6.0), dpi=150, layout="constrained")
        if saved:
            axes, beside = figure.subplots(1, 2, width_ratios=[1.4, 1])
            _draw_savings(beside, saved, tints)
        else:
            axes = figure.subplots()
        _draw_pairs(axes, alike(runs))
        _draw_runs(axes, runs, tints)
        _draw_frontier(axes, runs)
        axes.set(xscale="log", ylabel="loss (nats per token)")
        axes.set_xlabel(
            f"bytes of gradients leaving a node in the training,\non {cluster.name} "
            f"({cluster.nodes} nodes)"
        )
        _in_bytes(axes)
        axes.margins(x=0.12)
        legend_below(axes)
        figure.suptitle(_title(saved), x=0.02, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, out)


def _draw_pairs(axes: Any, groups: list[list[Sent]]) -> None:
    for group in groups:
        sent, losses = [run.bytes for run in group], [run.loss for run in group]
        axes.plot(sent, losses, color="#BBBBBB", linewidth=0.9, zorder=1)
        if len(groups) <= _MOST_LABELS:
            last = group[-1]
            text = f"{human_count(last.n)} parameters,\n{human_count(last.tokens)} tokens"
            axes.annotate(
                text, (last.bytes, last.loss), (7, 0), textcoords="offset points", va="center",
                fontsize=7.5, color="#555555",
            )  # fmt: skip


def _draw_runs(axes: Any, runs: list[Sent], tints: dict[str, str]) -> None:
    families = list(dict.fromkeys(run.family for run in runs))
    for index, family in enumerate(families):
        for periods, tint in tints.items():
            those = [run for run in runs if (run.family, run.periods) == (family, periods)]
            if those:
                axes.scatter(
                    [run.bytes for run in those], [run.loss for run in those], s=32, zorder=3,
                    color=tint, marker=_MARKERS[index % len(_MARKERS)], linewidths=0,
                    label=f"{family + ': ' if family else ''}periods {periods}",
                )  # fmt: skip


def _draw_frontier(axes: Any, runs: list[Sent]) -> None:
    """Steps through the efficient runs: what a number of bytes buys, no more than was measured."""
    efficient = [run for run in runs if run.efficient]
    axes.step(
        [*(run.bytes for run in efficient), max(run.bytes for run in runs)],
        [*(run.loss for run in efficient), efficient[-1].loss],
        where="post", color="black", linewidth=1.2, zorder=2, label="least loss for these bytes",
    )  # fmt: skip


def _draw_savings(axes: Any, saved: list[Saving], tints: dict[str, str]) -> None:
    reference = saved[0].reference
    axes.plot([1, *(s.fewer for s in saved)], [0, *(s.loss for s in saved)], color="#BBBBBB")
    axes.plot([1], [0], "o", color=tints[reference], markersize=7, label=f"periods {reference}")
    for s in saved:
        tint, pairs = tints[s.periods], len(s.costs)
        axes.plot([s.fewer] * pairs, s.costs, "o", color=tint, markersize=3, alpha=0.4)
        axes.errorbar(
            [s.fewer], [s.loss], yerr=s.standard_error, fmt="o", capsize=3, color=tint,
            markersize=7, label=f"periods {s.periods}: {s.fewer:.2f}x, {_cost(s)}",
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"times fewer bytes than periods {reference}")
    axes.set_ylabel(
        "loss above it, same size and tokens\n(nats per token, mean and standard error)"
    )
    axes.margins(0.15)
    legend_below(axes)


def _in_bytes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high < 30 * low:  # or a tick or two would be all
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _cost(saving: Saving) -> str:
    count, error = len(saving.costs), saving.standard_error
    within = "" if error is None else f" ± {error:.4f}"
    return f"{saving.loss:+.4f}{within} nats, {count} pair{'s' * (count > 1)} of runs"


def _title(saved: list[Saving]) -> str:
    if not saved:
        return "Loss against inter-node bytes"
    most = max(saved, key=lambda saving: saving.fewer)
    return (
        f"Periods {most.periods} send {most.fewer:.2f} times fewer bytes than {most.reference}, "
        f"for {_cost(most)}"
    )

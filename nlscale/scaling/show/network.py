"""The figure of loss against what a training sends between nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes, human_count
from nlscale.scaling.law.network import Sent
from nlscale.scaling.law.savings import LEVEL, Mean, Saving, alike, by_setting, least, savings
from nlscale.scaling.show.figure import COLOURS, STYLE, legend_below
from nlscale.telemetry.figures import save_figure

_MARKERS = "os^Dv<>"
_MOST_LABELS = 8
_FEW = 4  # settings that the smaller figure has room for
_FILLS = (None, "white", "#CCCCCC")  # of a marker, from one round of the colours to the next
_LOGARITHMIC = 10  # times fewer bytes, from which on the axis of them is


def draw_network(runs: list[Sent], cluster: Cluster, out: Path) -> Path:
    """Draw loss over the bytes a node sends in the training, and the frontier of the two.

    A colour, with another filling once all are used up, is a setting of the levels, a marker a
    family. Runs that differ in their setting alone are joined by a line through the means over
    their seeds, of which the frontier is too: the least of several seeds would be luck. Where there
    are pairs, another panel shows what each setting saves and costs beside the one that sends most.

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
    looks = {setting: _look(i) for i, setting in enumerate(by_setting(runs))}
    with rc_context(STYLE):
        more = max(0, len(looks) - _FEW)
        # a line of the legend each, and room for names that are longer than a few periods
        size = (11.5 if saved else 8.0, 6.0 + 0.2 * more)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        if saved:
            axes, beside = figure.subplots(1, 2, width_ratios=[1.4, 1])
            _draw_savings(beside, saved, looks)
        else:
            axes = figure.subplots()
        groups = alike(runs)
        _draw_groups(axes, groups)
        _draw_runs(axes, runs, looks)
        _draw_frontier(axes, groups)
        axes.set(xscale="log", ylabel="loss (nats per token)")
        axes.set_xlabel(
            f"bytes of gradients leaving a node in the training,\non {cluster.name} "
            f"({cluster.nodes} nodes)"
        )
        _in_bytes(axes)
        axes.margins(x=0.12)
        if len({run.family for run in runs}) > 1 or not saved:
            legend_below(axes)
        else:  # the other panel names the settings, of both
            axes.legend(*_of_the_line(axes), fontsize=8.5, loc="best")
        figure.suptitle(_title(saved), x=0.02, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, out)


def _look(index: int) -> dict[str, Any]:
    """The colour of a setting, and once all are used up what fills its markers."""
    colour = COLOURS[index % len(COLOURS)]
    fill = _FILLS[index // len(COLOURS) % len(_FILLS)]
    return {"color": colour, "markerfacecolor": fill or colour}


def _draw_groups(axes: Any, groups: list[list[Mean]]) -> None:
    for group in groups:
        sent, losses = [mean.bytes for mean in group], [mean.loss for mean in group]
        axes.plot(sent, losses, color="#BBBBBB", linewidth=0.9, zorder=1)
        if len(groups) <= _MOST_LABELS:
            last = group[-1]
            text = f"{human_count(last.n)} parameters,\n{human_count(last.tokens)} tokens"
            axes.annotate(
                text, (last.bytes, last.loss), (7, 0), textcoords="offset points", va="center",
                fontsize=7.5, color="#555555",
            )  # fmt: skip


def _draw_runs(axes: Any, runs: list[Sent], looks: dict[str, dict[str, Any]]) -> None:
    families = list(dict.fromkeys(run.family for run in runs))
    for index, family in enumerate(families):
        for setting, look in looks.items():
            those = [run for run in runs if (run.family, run.setting) == (family, setting)]
            if those:
                axes.plot(
                    [run.bytes for run in those], [run.loss for run in those], linestyle="none",
                    marker=_MARKERS[index % len(_MARKERS)], markersize=5.5, zorder=3, **look,
                    label=f"{family + ': ' if family else ''}{_said(setting)}",
                )  # fmt: skip


def _draw_frontier(axes: Any, groups: list[list[Mean]]) -> None:
    """Steps through the efficient means: what bytes buy, no more than was measured."""
    means = [mean for group in groups for mean in group]
    efficient = least(means)
    axes.step(
        [*(mean.bytes for mean in efficient), max(mean.bytes for mean in means)],
        [*(mean.loss for mean in efficient), efficient[-1].loss],
        where="post", color="black", linewidth=1.2, zorder=2, label="least loss for these bytes",
    )  # fmt: skip


def _of_the_line(axes: Any) -> tuple[list[Any], list[str]]:
    """The handle and the label of the frontier alone."""
    handles, labels = axes.get_legend_handles_labels()
    return handles[-1:], labels[-1:]


def _draw_savings(axes: Any, saved: list[Saving], looks: dict[str, dict[str, Any]]) -> None:
    reference = saved[0].reference
    axes.plot(
        [1], [0], "o", markersize=7, label=f"{_said(reference)}: reference", **looks[reference]
    )
    for s in saved:
        look, pairs = looks[s.setting], len(s.costs)
        axes.plot([s.fewer] * pairs, s.costs, "o", color=look["color"], markersize=3, alpha=0.4)
        low, high = s.interval or (s.loss, s.loss)
        axes.errorbar(
            [s.fewer], [s.loss], yerr=[[s.loss - low], [high - s.loss]], fmt="o", capsize=3,
            markersize=7, label=f"{_said(s.setting)}: {s.fewer:.2f}x, {_cost(s)}", **look,
        )  # fmt: skip
    if max(s.fewer for s in saved) > _LOGARITHMIC:
        axes.set_xscale("log")
        _in_times(axes)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"times fewer bytes than {_said(reference)}")
    axes.set_ylabel(
        f"loss above it at equal size, tokens and seed\n"
        f"(nats per token; intervals hold together at {LEVEL:.0%})"
    )
    axes.margins(0.15)
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, fontsize=8.5, loc="outside lower left")


def _said(setting: str) -> str:
    """A setting's name, after what its numbers are."""
    return f"periods {setting}" if setting[0].isdigit() else setting


def _in_times(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _in_bytes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high < 30 * low:  # or a tick or two would be all
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _cost(saving: Saving) -> str:
    count, interval = len(saving.costs), saving.relative_interval
    within = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return (
        f"{saving.loss:+.4f} nats, {saving.percent.mean:+.2f}%{within}, "
        f"{count} pair{'s' * (count > 1)}"
    )


def _title(saved: list[Saving]) -> str:
    if not saved:
        return "Loss against inter-node bytes"
    most = max(saved, key=lambda saving: saving.fewer)
    if len(saved) > 1:
        costs = [saving.percent.mean for saving in saved]
        return (
            f"{len(saved)} settings beside {_said(most.reference)}: "
            f"{min(saving.fewer for saving in saved):.1f} to {most.fewer:.4g} times fewer bytes,\n"
            f"{min(costs):+.1f}% to {max(costs):+.1f}% loss at equal size, tokens and seed"
        )
    return (
        f"{_capital(_said(most.setting))} sends {most.fewer:.2f} times fewer bytes than "
        f"{_said(most.reference)},\nfor {_cost(most)}"
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

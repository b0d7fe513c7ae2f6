"""A plan as a person reads it: a table, and a figure of the bytes of every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.plan.plan import Plan
from nlscale.plan.traffic import Traffic
from nlscale.units import human_bytes, human_count

_BLUE, _PALE, _GREY = "#0072B2", "#EFB48A", "#8C8C8C"


def print_plan(plan: Plan, console: Console) -> None:
    """Print the table, what it means, and the warnings."""
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node} GPUs"
    console.print(
        f"{cluster.name}: {nodes}, {cluster.inter_node_gbit:g} Gbit/s a node; "
        f"{human_count(plan.parameters)} parameters, {human_count(plan.tokens_per_step)} tokens a "
        f"step, {plan.steps:,} steps"
    )
    crosses = cluster.nodes > 1
    console.print()
    console.print(_levels(plan, crosses))
    console.print()
    if crosses:
        _summarise(plan, console)
    else:
        console.print("One node: nothing crosses the network.")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")


def _levels(plan: Plan, crosses: bool) -> Table:
    # narrow enough for a terminal of 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nlevel", no_wrap=True)
    columns = ["\nparameters", "period,\nsteps", "\nupdates"]
    if crosses:
        columns += ["bytes,\nmean", "peak\naligned", "peak\nstaggered", "link\ntime"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    seconds = plan.cluster.link_seconds
    for i, level in enumerate(plan.levels):
        cells = [human_count(level.parameters), f"{level.period:,}", f"{level.updates:,}"]
        if crosses:
            mean = float(plan.aligned.mean_per_level[i])
            cells += [
                human_bytes(mean),
                human_bytes(plan.aligned.peak_per_level[i]),
                human_bytes(plan.staggered.peak_per_level[i]),
                human_seconds(seconds(mean)),
            ]
        table.add_row(level.name, *cells)
    if crosses:
        table.add_section()
        total = [plan.aligned.mean, plan.aligned.peak, plan.staggered.peak]
        table.add_row(
            "all levels",
            human_count(plan.parameters), "", "",
            *map(human_bytes, total),
            human_seconds(seconds(plan.aligned.mean)),
            style="bold",
        )  # fmt: skip
        table.add_row(
            "plain",
            human_count(plan.parameters), "1", f"{plan.steps:,}",
            *[human_bytes(plan.plain)] * 3,
            human_seconds(seconds(plan.plain)),
        )  # fmt: skip
    return table


def _summarise(plan: Plan, console: Console) -> None:
    assert plan.fewer is not None
    console.print(
        f"Bytes are those leaving one node in a step; plain is plain data parallel. Levels send "
        f"{plan.fewer:.2f} times fewer; their largest step is "
        f"{plan.aligned.peak / plan.plain:.2f} of plain when aligned, "
        f"{plan.staggered.peak / plan.plain:.2f} when staggered."
    )
    if not plan.defers:
        console.print("levels.reduction=every-step: this run sends what plain data parallel sends.")
    else:
        chosen = "staggered" if plan.staggers else "aligned"
        peak = (plan.staggered if plan.staggers else plan.aligned).peak
        console.print(
            f"This run is {chosen}: at most {human_seconds(plan.cluster.link_seconds(peak))} of "
            f"link time in a step. The last step, which applies unfinished windows, is not counted."
        )


def human_seconds(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``; three significant digits."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def draw_plan(plan: Plan, out: Path) -> Path:
    """Draw the bytes leaving a node at each step of a longest period: aligned, staggered, plain.

    Args:
        plan: on more than one node.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    assert plan.fewer is not None
    unit, scale = _unit(max(plan.plain, plan.aligned.peak))
    aligned, staggered = _window(plan, plan.aligned), _window(plan, plan.staggered)
    steps = np.arange(1, len(aligned) + 1)
    style = {"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}
    with rc_context(style):
        figure = Figure(figsize=(8.0, 4.4), dpi=160, layout="constrained")
        axes = figure.subplots()
        axes.axhline(
            plan.plain / scale, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.4,
            label=f"plain data parallel: {plan.plain / scale:.3g}",
        )  # fmt: skip
        # lines, not bars: a single high step of a long period must stay visible
        axes.vlines(
            steps, 0, aligned / scale, color=_PALE, linewidth=max(0.7, 280 / len(steps)),
        )  # fmt: skip
        axes.plot([], [], color=_PALE, linewidth=5, label=_peak("aligned", plan.aligned, scale))
        axes.stairs(
            staggered / scale, np.arange(len(steps) + 1) + 0.5, baseline=None, color=_BLUE,
            linewidth=0.9 if len(steps) > 200 else 1.6,
            label=_peak("staggered", plan.staggered, scale),
        )  # fmt: skip
        axes.axhline(
            plan.aligned.mean / scale, color="black", linewidth=1.0, linestyle=":",
            label=f"mean of both: {plan.aligned.mean / scale:.3g}",
        )  # fmt: skip
        axes.set_xlim(0.5, len(steps) + 0.5)
        axes.set_ylim(0, 1.05 * max(plan.plain, plan.aligned.peak) / scale)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(f"{unit} leaving a node in a step")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.suptitle(
            f"{plan.cluster.name}, {plan.cluster.nodes} nodes: on average {plan.fewer:.2f} times "
            f"fewer bytes than plain data parallel",
            x=0.02, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    return out


def _window(plan: Plan, traffic: Traffic) -> NDArray[np.float64]:
    """The last longest period of a cycle, where the aligned levels all meet; 32 steps at least."""
    shown = max(32, *(level.period for level in plan.levels))
    return np.tile(traffic.per_step, -(-shown // plan.cycle))[-shown:]


def _peak(name: str, traffic: Traffic, scale: float) -> str:
    return f"{name}: at most {traffic.peak / scale:.3g}"


def _unit(number: float) -> tuple[str, float]:
    text = human_bytes(number).split()[1]
    return text, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}[text]

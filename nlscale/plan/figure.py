"""A figure of the bytes that leave a node at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nlscale.config.units import human_bytes
from nlscale.plan.plan import Plan
from nlscale.plan.traffic import Traffic
from nlscale.telemetry.figures import save_figure

_BARS = 400
"""Of a figure of a run, at most."""
_BLUE, _PALE, _GREY = "#0072B2", "#EFB48A", "#8C8C8C"


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
    each = max(1, -(-plan.cycle // _BARS)) if _changes(plan) else 1
    steps = 1 + each * np.arange(len(aligned))
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
            staggered / scale, each * np.arange(len(steps) + 1) + 0.5, baseline=None, color=_BLUE,
            linewidth=0.9 if len(steps) > 200 else 1.6,
            label=_peak("staggered", plan.staggered, scale),
        )  # fmt: skip
        axes.axhline(
            plan.aligned.mean / scale, color="black", linewidth=1.0, linestyle=":",
            label=f"mean of both: {plan.aligned.mean / scale:.3g}",
        )  # fmt: skip
        axes.set_xlim(0.5, each * len(steps) + 0.5)
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
        return save_figure(figure, out)


def _window(plan: Plan, traffic: Traffic) -> NDArray[np.float64]:
    """The last longest period of a cycle, where the aligned levels all meet; 32 steps at least.

    Where a period changes, all of the run, the largest of the steps that share a bar.
    """
    if _changes(plan):
        first = np.arange(0, plan.cycle, max(1, -(-plan.cycle // _BARS)))
        return np.maximum.reduceat(traffic.per_step, first)
    shown = max(32, *(level.period for level in plan.levels))
    return np.tile(traffic.per_step, -(-shown // plan.cycle))[-shown:]


def _changes(plan: Plan) -> bool:
    return any(level.periods for level in plan.levels)


def _peak(name: str, traffic: Traffic, scale: float) -> str:
    return f"{name}: at most {traffic.peak / scale:.3g}"


def _unit(number: float) -> tuple[str, float]:
    text = human_bytes(number).split()[1]
    return text, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}[text]

"""The figure of a fitted law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.config.units import human_count
from nlscale.scaling.law.analysis import Analysis
from nlscale.scaling.law.law import Array
from nlscale.telemetry.figures import save_figure

# Okabe-Ito: told apart with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 10, "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True,
    "grid.color": "#E4E4E4", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
DASHED = (0, (4, 2.5))
_CURVES = 5
_SHOWN = 1.6  # times the largest N, and under the smallest, that a curve goes on for
_MOST_TICKS = 6
_AHEAD = 10.0  # times the largest measured compute, where no budget asks for more


def draw_fit(one: Analysis, out: Path) -> Path:
    """Draw loss over compute with the fitted curve of each D, residuals, and optimal N.

    Curves and the frontier are solid within the measured range and dashed beyond it; the bands
    are the bootstrap's intervals. Where the law knows of periods, curves, frontier and optima are
    those of period 1, and another panel shows what the periods cost.

    Args:
        one: the analysis.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    points, low_d, high_d = one.points, np.log(one.points.d.min()), np.log(one.points.d.max())

    def colour(d: Any) -> Any:
        # Short of the palest end, which does not show on white.
        return colormaps["viridis"](0.9 * (np.log(d) - low_d) / (high_d - low_d))

    with rc_context(STYLE):
        rows = 2 + (one.period is not None)
        figure = Figure(figsize=(11.0, 3.3 + 1.25 * rows), dpi=150, layout="constrained")
        grid = figure.add_gridspec(rows, 2, width_ratios=[1.5, 1])
        axes = figure.add_subplot(grid[:, 0])
        residuals, sizes = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        if one.period is not None:
            _draw_periods(figure.add_subplot(grid[2, 1]), one, colour(points.d))

        size = 22 if len(points.n) < 100 else 10
        dots = {"c": colour(points.d), "s": size, "linewidths": 0, "alpha": 0.85}
        axes.scatter(points.flops, points.loss, zorder=3, **dots)
        _draw_curves(axes, one, colour)
        if one.ill_conditioned:
            flops = np.geomspace(points.flops.min(), points.flops.max(), 200)
        else:
            flops = budgets_ahead(one)
        least = "least loss" if one.period is None else "least loss at period 1"
        draw_frontier(axes, one, flops, 2, "black", f"{least}, {interval_name(one)}")
        for o in one.optimal:
            if o.loss is not None and o.intervals is not None:
                low, high = o.intervals["loss"]
                axes.errorbar(
                    o.flops, o.loss, yerr=[[max(o.loss - low, 0)], [max(high - o.loss, 0)]],
                    fmt="D", markersize=5, capsize=3, color="#D55E00", zorder=4,
                    label=f"{o.flops:.2g} FLOPs: {o.loss:.3f} ({low:.3f} to {high:.3f})",
                )  # fmt: skip
        axes.plot([], [], color="black", linewidth=1, linestyle=DASHED, label="beyond the data")
        axes.set_ylabel("loss (nats per token)")
        logarithmic_compute(axes)
        axes.set_xlabel("compute (FLOPs, forward and backward)")
        shade_beyond(axes, float(points.flops.max()))
        axes.legend(fontsize=8.5, loc="upper right", title=law_text(one), title_fontsize=8.5)

        residuals.scatter(points.flops, -100 * one.fit.residuals, **dots)
        residuals.axhline(0, color="black", linewidth=0.8)
        residuals.set_ylabel("measured over fitted\nloss, less 1 (%)")
        logarithmic_compute(residuals)
        residuals.set_xlabel("compute (FLOPs)")
        draw_frontier(sizes, one, flops, 0, "black", "parametric")
        _mark_minima(sizes, one)
        sizes.set(yscale="log", xlabel="compute (FLOPs)")
        logarithmic_compute(sizes)
        sizes.set_ylabel("compute-optimal N\n(parameters)")
        sizes.legend(fontsize=8.5, loc="upper left")
        _title(figure, one)
        return save_figure(figure, out)


def _draw_periods(axes: Any, one: Analysis, colours: Any) -> None:
    """What each run lost beside the law at period 1, over its period, and G log2(period)."""
    points, law = one.points, one.fit.law
    assert points.period is not None and one.period is not None
    above = points.loss - law.loss(points.n, points.d)
    # Runs of one period stand side by side, or they would hide each other.
    aside = 2 ** np.linspace(-0.12, 0.12, len(above))[np.argsort(np.argsort(points.d))]
    axes.scatter(points.period * aside, above, c=colours, s=10, linewidths=0, alpha=0.7)
    periods = np.geomspace(1, float(points.period.max()), 100)
    low, high = one.bootstrap.band(one.bootstrap.laws.column().period_cost(periods))
    axes.fill_between(periods, low, high, color="black", alpha=0.15, linewidth=0)
    axes.plot(
        periods, law.period_cost(periods), color="black", linewidth=2.0,
        label=f"{float(law.G):.3g} log2(period), {interval_name(one)}",
    )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = [setting.period for setting in one.period.settings]
    if len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xlabel("mean period of the levels (steps)")
    axes.set_ylabel("loss above the law\nat period 1 (nats)")
    axes.legend(fontsize=8.5, loc="upper left")


def _draw_curves(axes: Any, one: Analysis, colour: Callable[[Any], Any]) -> None:
    """Loss over compute at a few D; solid over the N measured near that D."""
    points, law = one.points, one.fit.law
    ends = np.flatnonzero(np.diff(np.sort(np.log(points.d))) > 0.01)
    distinct = np.sort(points.d)[np.append(ends, len(points.d) - 1)]
    if len(distinct) > _CURVES:
        # Evenly in rank and short of the ends, where a D may have been measured once.
        distinct = distinct[(np.linspace(0.06, 0.94, _CURVES) * (len(distinct) - 1)).astype(int)]
    for d in distinct:
        near = points.n[np.abs(np.log(points.d / d)) < 0.35]
        n = np.geomspace(near.min() / _SHOWN, near.max() * _SHOWN, 200)
        flops, loss = points.per_pair * n * d, law.loss(n, d)
        solid = (n >= near.min()) & (n <= near.max())
        axes.plot(flops, loss, color=colour(d), linewidth=0.9, linestyle=DASHED)
        label = f"D = {human_count(float(d))} tokens"
        axes.plot(flops[solid], loss[solid], color=colour(d), linewidth=1.5, label=label)


def draw_frontier(
    axes: Any, one: Analysis, flops: Array, which: int, tint: str, label: str
) -> None:
    """Optimal N (which 0), D (1) or loss (2) over compute with its band, dashed beyond the data."""
    points = one.points
    value = one.fit.law.optimum(flops, points.per_pair)[which]
    low, high = one.bootstrap.band(
        one.bootstrap.laws.column().optimum(flops, points.per_pair)[which]
    )
    inside = (flops >= points.flops.min() * 0.999) & (flops <= points.flops.max() * 1.001)
    axes.fill_between(flops, low, high, color=tint, alpha=0.15, linewidth=0)
    axes.plot(flops, value, color=tint, linewidth=1.2, linestyle=DASHED)
    axes.plot(flops[inside], value[inside], color=tint, linewidth=2.0, label=label)


def _mark_minima(axes: Any, one: Analysis) -> None:
    for found, marker, tint, name in (
        (one.envelope, "s", "#009E73", "envelope"), (one.isoflop, "o", "#D55E00", "isoFLOP minima")
    ):  # fmt: skip
        if found.a is not None:
            axes.plot(
                [m.flops for m in found.minima], [m.n for m in found.minima], marker, color=tint,
                markersize=5, markerfacecolor="none", label=f"{name}: a = {found.a:.2f}",
            )  # fmt: skip


def budgets_ahead(one: Analysis) -> Array:
    """Budgets from the smallest measured to 10 times the largest, or to what was asked."""
    most = max([_AHEAD * float(one.points.flops.max()), *(1.5 * o.flops for o in one.optimal)])
    return np.geomspace(float(one.points.flops.min()), most, 300)


def interval_name(one: Analysis) -> str:
    return f"{100 * one.bootstrap.level:g}% interval"


def law_text(one: Analysis) -> str:
    law = one.fit.law
    return (
        f"L = {float(law.E):.3f} + {float(law.A):.4g} / N^{float(law.alpha):.3f} + "
        f"{float(law.B):.4g} / D^{float(law.beta):.3f}"
        + ("" if one.period is None else f" + {float(law.G):.3g} log2(period)")
    )


def legend_below(axes: Any) -> None:
    """A legend under the axes, where it hides no point."""
    axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(0.0, -0.16))


def logarithmic_compute(axes: Any) -> None:
    """A logarithmic axis of compute, labelled at 1, 2 and 5 so that a few octaves stay legible."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2.5, 2.5)))


def shade_beyond(axes: Any, flops: float) -> None:
    """Shade the compute beyond what was measured."""
    low, high = axes.get_xlim()
    if high > flops:
        axes.axvspan(flops, high, color="#F3F3F3", linewidth=0, zorder=0)
        axes.set_xlim(low, high)


def _title(figure: Any, one: Analysis) -> None:
    low, high = one.bootstrap.interval(one.bootstrap.laws.exponents[0])
    a = float(one.fit.law.exponents[0])
    text = f"{len(one.points.n)} runs: N_opt grows as C^{a:.2f} ({low:.2f} to {high:.2f})"
    if one.ill_conditioned:
        text += ", ill-conditioned: no extrapolation"
    figure.suptitle(text, x=0.02, ha="left", fontsize=12, fontweight="bold")

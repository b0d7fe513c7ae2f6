"""Figures of a fitted law, and of two families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.figures import save_figure
from nlscale.scaling.analysis import Analysis, Multiplier
from nlscale.scaling.law import Array
from nlscale.units import human_count

# Okabe-Ito: told apart with every common form of colour blindness.
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "font.size": 10, "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True,
    "grid.color": "#E4E4E4", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
_DASHED = (0, (4, 2.5))
_CURVES = 5
_SHOWN = 1.6  # times the largest N, and under the smallest, that a curve goes on for
_AHEAD = 10.0  # times the largest measured compute, where no budget asks for more


def draw_fit(one: Analysis, out: Path) -> Path:
    """Draw loss over compute with the fitted curve of each D, residuals, and optimal N.

    Curves and the frontier are solid within the measured range and dashed beyond it; the bands
    are the bootstrap's intervals.

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

    with rc_context(_STYLE):
        figure = Figure(figsize=(11.0, 5.8), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1])
        axes = figure.add_subplot(grid[:, 0])
        residuals, sizes = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])

        size = 22 if len(points.n) < 100 else 10
        dots = {"c": colour(points.d), "s": size, "linewidths": 0, "alpha": 0.85}
        axes.scatter(points.flops, points.loss, zorder=3, **dots)
        _draw_curves(axes, one, colour)
        if one.ill_conditioned:
            flops = np.geomspace(points.flops.min(), points.flops.max(), 200)
        else:
            flops = _ahead(one)
        _draw_frontier(axes, one, flops, 2, "black", f"least loss, {_level(one)}")
        for o in one.optimal:
            if o.loss is not None and o.intervals is not None:
                low, high = o.intervals["loss"]
                axes.errorbar(
                    o.flops, o.loss, yerr=[[max(o.loss - low, 0)], [max(high - o.loss, 0)]],
                    fmt="D", markersize=5, capsize=3, color="#D55E00", zorder=4,
                    label=f"{o.flops:.2g} FLOPs: {o.loss:.3f} ({low:.3f} to {high:.3f})",
                )  # fmt: skip
        axes.plot([], [], color="black", linewidth=1, linestyle=_DASHED, label="beyond the data")
        axes.set(xscale="log", xlabel="compute (FLOPs)", ylabel="loss (nats per token)")
        axes.legend(fontsize=8.5, loc="upper right", title=_law_text(one), title_fontsize=8.5)

        residuals.scatter(points.flops, -100 * one.fit.residuals, **dots)
        residuals.axhline(0, color="black", linewidth=0.8)
        residuals.set(xscale="log", ylabel="measured over fitted\nloss, less 1 (%)")
        residuals.set_xlabel("compute (FLOPs)")
        _draw_frontier(sizes, one, flops, 0, "black", "parametric")
        _mark_minima(sizes, one)
        sizes.set(xscale="log", yscale="log", xlabel="compute (FLOPs)")
        sizes.set_ylabel("compute-optimal N\n(parameters)")
        sizes.legend(fontsize=8.5, loc="upper left")
        _title(figure, one)
        return save_figure(figure, out)


def draw_families(families: dict[str, Analysis], ratios: list[Multiplier], out: Path) -> Path:
    """Draw the frontier of each family over its runs, and the compute multiplier at equal loss.

    Args:
        families: at most 7.
        ratios: as `multipliers` gives them.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(11.0, 4.8), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
        reach = np.array([float(v) for one in families.values() for v in _ahead(one)[[0, -1]]])
        for index, (name, one) in enumerate(families.items()):
            tint = _CYCLE[index % len(_CYCLE)]
            left.scatter(
                one.points.flops, one.points.loss, s=12, color=tint, alpha=0.5, linewidths=0
            )
            flops = np.geomspace(reach.min(), reach.max(), 300)
            if one.ill_conditioned:
                flops = np.geomspace(one.points.flops.min(), one.points.flops.max(), 200)
            label = f"{name}: least loss, {_level(one)}"
            _draw_frontier(left, one, flops, 2, tint, label)
            drawn = [m for m in ratios if m.family == name]
            if drawn:
                ends = np.array([m.interval for m in drawn])
                ends[~np.isfinite(ends)] = np.nan  # an end that no compute reaches has no cap
                values = np.array([m.value for m in drawn])
                right.errorbar(
                    [m.loss for m in drawn], values, fmt="o-", capsize=3, color=tint,
                    yerr=np.abs(np.stack([values - ends[:, 0], ends[:, 1] - values])),
                    label=f"{name}, {_level(one)}",
                )  # fmt: skip
        left.plot([], [], color="black", linewidth=1, linestyle=_DASHED, label="beyond the data")
        left.set(xscale="log", xlabel="compute (FLOPs)", ylabel="loss (nats per token)")
        left.legend(fontsize=9)
        reference = next(iter(families))
        right.axhline(1, color="black", linewidth=0.8)
        right.invert_xaxis()  # better to the right, as on the left more compute is
        right.set_xlabel("loss (nats per token)")
        right.set_ylabel(f"FLOPs of {reference} over FLOPs\nof the family, at equal loss")
        if ratios:
            right.legend(fontsize=9)
        text = _compared(ratios[-1]) if ratios else "The families share no loss to compare at"
        figure.suptitle(text, x=0.02, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, out)


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
        axes.plot(flops, loss, color=colour(d), linewidth=0.9, linestyle=_DASHED)
        label = f"D = {human_count(float(d))} tokens"
        axes.plot(flops[solid], loss[solid], color=colour(d), linewidth=1.5, label=label)


def _draw_frontier(
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
    axes.plot(flops, value, color=tint, linewidth=1.2, linestyle=_DASHED)
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


def _ahead(one: Analysis) -> Array:
    """Budgets from the smallest measured to 10 times the largest, or to what was asked."""
    most = max([_AHEAD * float(one.points.flops.max()), *(1.5 * o.flops for o in one.optimal)])
    return np.geomspace(float(one.points.flops.min()), most, 300)


def _level(one: Analysis) -> str:
    return f"{100 * one.bootstrap.level:g}% interval"


def _law_text(one: Analysis) -> str:
    law = one.fit.law
    return (
        f"L = {float(law.E):.3f} + {float(law.A):.4g} / N^{float(law.alpha):.3f} + "
        f"{float(law.B):.4g} / D^{float(law.beta):.3f}"
    )


def _compared(m: Multiplier) -> str:
    low, high = m.interval
    return (
        f"At a loss of {m.loss:.3f}, {m.reference} takes {m.value:.2f} times the FLOPs of "
        f"{m.family} ({low:.2f} to {high:.2f})"
    )


def _title(figure: Any, one: Analysis) -> None:
    low, high = one.bootstrap.interval(one.bootstrap.laws.exponents[0])
    a = float(one.fit.law.exponents[0])
    text = f"{len(one.points.n)} runs: N_opt grows as C^{a:.2f} ({low:.2f} to {high:.2f})"
    if one.ill_conditioned:
        text += ", ill-conditioned: no extrapolation"
    figure.suptitle(text, x=0.02, ha="left", fontsize=12, fontweight="bold")

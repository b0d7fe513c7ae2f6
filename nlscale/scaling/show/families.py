"""The figure of several families: their frontiers, and the compute multiplier at equal loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nlscale.scaling.law.analysis import Analysis, Multiplier
from nlscale.scaling.show.figure import (
    COLOURS,
    DASHED,
    STYLE,
    budgets_ahead,
    draw_frontier,
    interval_name,
    law_text,
    legend_below,
    logarithmic_compute,
    shade_beyond,
)
from nlscale.telemetry.figures import save_figure


def draw_families(families: dict[str, Analysis], ratios: list[Multiplier], out: Path) -> Path:
    """Draw the frontier of each family over its runs, and the compute multiplier at equal loss.

    What lies beyond the data is dashed, and shaded where no family was measured; multipliers there
    are hollow.

    Args:
        families: at most 7.
        ratios: as `multipliers` gives them.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 5.8), dpi=150, layout="constrained")
        if ratios:
            left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
            _draw_multipliers(right, families, ratios)
        else:
            left = figure.subplots()
        reach = np.array(
            [float(v) for one in families.values() for v in budgets_ahead(one)[[0, -1]]]
        )
        for index, (name, one) in enumerate(families.items()):
            tint = COLOURS[index % len(COLOURS)]
            left.scatter(
                one.points.flops, one.points.loss, s=12, color=tint, alpha=0.5, linewidths=0
            )
            flops = np.geomspace(reach.min(), reach.max(), 300)
            if one.ill_conditioned:
                flops = np.geomspace(one.points.flops.min(), one.points.flops.max(), 200)
            doubtful = ", ill-conditioned" if one.ill_conditioned else ""
            label = f"{name}, {len(one.points.n)} runs{doubtful}: {law_text(one)}"
            draw_frontier(left, one, flops, 2, tint, label)
        first = next(iter(families.values()))
        left.fill_between(
            [], [], [], color="black", alpha=0.15, linewidth=0,
            label=f"least loss of the law{_at_period(families)}, {interval_name(first)}",
        )  # fmt: skip
        left.plot([], [], color="black", linewidth=1, linestyle=DASHED, label="beyond the data")
        left.set_ylabel("loss (nats per token)")
        logarithmic_compute(left)
        left.set_xlabel("compute (FLOPs, forward and backward)")
        shade_beyond(left, max(float(one.points.flops.max()) for one in families.values()))
        legend_below(left)
        text = _compared(ratios) if ratios else "The families share no loss to compare at"
        figure.suptitle(text, x=0.02, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, out)


def _draw_multipliers(axes: Any, families: dict[str, Analysis], ratios: list[Multiplier]) -> None:
    reference, *others = families
    axes.axhline(1, color=COLOURS[0], linewidth=1.2, label=reference)
    for index, name in enumerate(others, start=1):
        drawn = [m for m in ratios if m.family == name]
        if drawn:
            _draw_family(axes, families[name], drawn, COLOURS[index % len(COLOURS)])
    axes.invert_xaxis()  # better to the right, as on the left more compute is
    axes.set_xlabel("loss (nats per token)")
    axes.set_ylabel(
        f"compute multiplier: FLOPs of {reference}\nover FLOPs of the family, at equal loss"
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.1))
    legend_below(axes)


def _draw_family(axes: Any, one: Analysis, ratios: list[Multiplier], tint: str) -> None:
    losses, values = np.array([m.loss for m in ratios]), np.array([m.value for m in ratios])
    ends = np.array([m.interval for m in ratios])
    unbounded = ~np.isfinite(ends[:, 1])
    ends[~np.isfinite(ends)] = np.nan
    axes.errorbar(
        losses, values, fmt="-", capsize=3, color=tint,
        yerr=np.abs(np.stack([values - ends[:, 0], ends[:, 1] - values])),
    )  # fmt: skip
    for loss, value in zip(losses[unbounded], values[unbounded], strict=True):
        axes.annotate(
            "", (loss, value), (0, 40), textcoords="offset points",
            arrowprops={"arrowstyle": "<-", "color": tint},
        )  # fmt: skip
    label = f"{ratios[0].family}, {interval_name(one)}"
    inside = np.array([m.beyond is None for m in ratios])
    axes.plot(losses[inside], values[inside], "o", color=tint, label=label)
    if not inside.all():
        label = f"{ratios[0].family}, beyond the data"
        outside = {"markerfacecolor": "white", "color": tint, "label": label}
        axes.plot(losses[~inside], values[~inside], "o", **outside)


def _at_period(families: dict[str, Analysis]) -> str:
    return " at period 1" if any(one.period is not None for one in families.values()) else ""


def _compared(ratios: list[Multiplier]) -> str:
    """The multiplier at the best loss that is within the data of both, else at the best."""
    m = min(ratios, key=lambda m: (m.beyond is not None, m.loss))
    low, high = m.interval
    where = "" if m.beyond is None else f", {m.beyond:.2g}x beyond the data"
    return (
        f"At a loss of {m.loss:.3f}{where}, {m.reference} takes {m.value:.2f} times the FLOPs of "
        f"{m.family} ({low:.2f} to {high:.2f})"
    )

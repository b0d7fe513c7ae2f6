"""Figures of a run, drawn from its metrics.jsonl alone (matplotlib is imported when drawing)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.config.units import human_count
from nlscale.errors import UserError
from nlscale.telemetry.fields import SUMMARY
from nlscale.telemetry.files import read_object
from nlscale.telemetry.panels import (
    HEIGHT,
    TOKENS,
    draw_panel,
    draw_panel_of_run,
    left_out,
    panels_of,
    panels_of_runs,
    rows_of,
)
from nlscale.telemetry.records import mistyped, parse
from nlscale.telemetry.source_panels import panels_of_sources

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOSS_FIGURE = "loss.png"

# Okabe-Ito: told apart with every common form of colour blindness.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
}

Record = dict[str, Any]


def read_records(run_dir: Path) -> list[Record]:
    """Every record of `run_dir`/metrics.jsonl, in file order.

    A torn last line (the run was killed while writing, or is writing now) is left out.

    Raises:
        UserError: there is no such file, or a line before the last is no record.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def update_steps(records: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The steps at which each level updated, from train records; levels in their given order.

    A level that never updated has an empty list.
    """
    steps: dict[str, list[int]] = {}
    for record in records:
        for name, level in (record.get("levels") or {}).items():
            updated = steps.setdefault(name, [])
            if level.get("updated"):
                updated.append(int(record["step"]))
    return steps


def draw_loss(run_dir: Path, out: Path | None = None) -> Path:
    """Draw training and validation loss; below it sources, evaluations, and the update steps of
    levels.

    Loss is in nats per token over step, with tokens seen on the top axis. Where summary.json has
    `unigram_nats_per_token`, or `unigram_bits_per_byte` and a validation record to convert it
    with, the loss of a unigram model is drawn as a reference.

    Args:
        run_dir: the run's directory; its name is the title.
        out: the image to write, in the format its suffix names; `run_dir`/loss.png by default.

    Returns:
        The path written.

    Raises:
        UserError: no metrics.jsonl, or no record with a loss in it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    out = Path(out) if out is not None else run_dir / LOSS_FIGURE
    records = read_records(run_dir)
    train = [r for r in records if r.get("kind") == "train"]
    validation = _validated(records)
    if not validation and all(r.get("loss") is None for r in train):
        raise UserError(f"{run_dir / METRICS_FILE} holds no loss yet: nothing to draw")
    levels = update_steps(train)
    by_source, unread = panels_of_sources(records)
    panels, more = panels_of(records)
    panels, more = [*by_source, *panels], more + unread
    strip = [0.26 * len(levels) + 0.1] if levels else []  # inches
    with rc_context(STYLE):
        figure = Figure(dpi=160, layout="constrained")
        axes, *others = rows_of(figure, [4.6, *[HEIGHT] * len(panels), *strip])
        if levels:
            _draw_levels(others[-1], levels, train)
        for below, panel in zip(others, panels, strict=False):  # the levels' row is the last
            draw_panel_of_run(below, panel, CYCLE)
        figure.axes[-1].set_xlabel(f"step{left_out(more)}")
        _draw_curves(axes, train, validation, _unigram_nats(run_dir, validation))
        _add_token_axis(axes, [*train, *validation])
        title = run_dir.resolve().name
        if validation and validation[-1].get("bits_per_byte") is not None:
            title += f": {validation[-1]['bits_per_byte']:.3f} bits per byte in validation"
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        return save_figure(figure, out)


def draw_comparison(runs: dict[str, Path], out: Path) -> Path:
    """Draw validation loss of several runs over tokens seen, and below it their evaluations.

    The horizontal axis is tokens, not steps, so that runs of different batch sizes compare.

    Args:
        runs: a label for each run and the run's directory.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.

    Raises:
        UserError: no runs, or one of them has no validation loss.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    if not runs:
        raise UserError("no runs to compare")
    with rc_context(STYLE):
        records = {label: read_records(run_dir) for label, run_dir in runs.items()}
        panels, more = panels_of_runs(records)
        figure = Figure(dpi=160, layout="constrained")
        axes, *others = rows_of(figure, [4.8, *[HEIGHT] * len(panels)])
        axes.spines["top"].set_visible(False)
        styles = {}
        for index, (label, run_dir) in enumerate(runs.items()):
            points = _validated(records[label])
            if not points:
                raise UserError(f"run {label!r} ({run_dir}) has no validation loss to compare")
            final = f"{points[-1]['loss']:.3f}"
            if (bits := points[-1].get("bits_per_byte")) is not None:
                final += f" ({bits:.3f} bits per byte)"
            styles[label] = {
                "color": CYCLE[index % len(CYCLE)],
                "linestyle": ("-", "--", ":")[index // len(CYCLE) % 3],
            }
            axes.plot(
                [float(r.get("tokens") or 0) for r in points],
                [r["loss"] for r in points],
                **styles[label],
                marker="o",
                markersize=3.5,
                linewidth=1.6,
                label=f"{label}: {final}",
            )
        for below, panel in zip(others, panels, strict=True):
            draw_panel(below, panel, TOKENS, styles)
        lowest = figure.axes[-1]
        lowest.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        lowest.set_xlabel(f"tokens{left_out(more)}")
        axes.set_ylabel("validation loss (nats per token)")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return save_figure(figure, Path(out))


def _validated(records: list[Record]) -> list[Record]:
    return [r for r in records if r.get("kind") == "validation" and r.get("loss") is not None]


def _draw_curves(
    axes: Any, train: list[Record], validation: list[Record], unigram: float | None
) -> None:
    kept = [r for r in train if r.get("loss") is not None]
    losses = np.array([r["loss"] for r in kept], dtype=np.float64)
    points = [r["loss"] for r in validation]
    shown = [*points, *([unigram] if unigram is not None else [])]
    if kept:
        steps = np.array([r["step"] for r in kept])
        centres, smooth = _smoothed(losses)
        # A single spike must not flatten the curve: raw losses count up to their percentiles.
        shown += [*smooth, *np.percentile(losses, [0.5, 99.5])]
        axes.plot(steps, losses, color=_BLUE, alpha=0.4, linewidth=0.7)
        axes.plot(steps[centres], smooth, color=_BLUE, linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(
            [r["step"] for r in validation],
            points,
            color=_ORANGE,
            linewidth=1.0,
            marker="o",
            markersize=4.5,
            label=f"validation: {points[-1]:.3f} at the end",
        )
    if unigram is not None:
        label = f"unigram model: {unigram:.3f}"
        axes.axhline(unigram, color=_GREY, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, 1.01 * max(r["step"] for r in [*train, *validation]))
    lost = [r["step"] for r in train if r.get("loss") is None]
    if lost:
        at_top = {"transform": axes.get_xaxis_transform(), "label": "loss not finite"}
        axes.plot(lost, [0.985] * len(lost), "x", color="black", markersize=5, **at_top)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    axes.legend(loc="upper right")


def _draw_levels(axes: Any, levels: dict[str, list[int]], train: list[Record]) -> None:
    """One row a level, the first at the top: a tick at each update, a bar where all steps did."""
    periods: dict[str, list[Any]] = {}
    for record in train:
        for name, level in (record.get("levels") or {}).items():
            periods.setdefault(name, []).append(level.get("period"))
    labels = []
    for row, (name, steps) in enumerate(levels.items()):
        labels.append(f"{name}  every {_period_text(periods[name])}")
        if set(periods[name]) == {1}:
            # Broken where an update was dropped, so the gap shows.
            runs = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1) if steps else []
            bars = [(run[0] - 0.5, len(run)) for run in runs]
            axes.broken_barh(bars, (row - 0.3, 0.6), color=_BLUE, linewidth=0)
        else:
            # Ticks too many to tell apart get thinner, and so melt into a pale bar, not a full one.
            width = min(1.0, 200 / max(len(steps), 1))
            axes.vlines(steps, row - 0.3, row + 0.3, color=_BLUE, linewidth=width, snap=width == 1)
    axes.set_ylim(len(levels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "top"):
        axes.spines[side].set_visible(False)


def _period_text(periods: list[Any]) -> str:
    """Of a level, from its records: "step", "16 steps", or "1 to 16 steps" where it changes."""
    least, most = min(periods), max(periods)
    if least != most:
        return f"{least} to {most} steps"
    return "step" if most == 1 else f"{most} steps"


def _add_token_axis(axes: Any, records: list[Record]) -> None:
    from matplotlib.ticker import MaxNLocator

    seen = dict(sorted((r["step"], r["tokens"]) for r in records if r.get("tokens") is not None))
    tokens = list(seen.values())
    if len(seen) < 2 or tokens[0] == tokens[-1]:
        axes.spines["top"].set_visible(False)
        return
    ticks = [t for t in MaxNLocator(6).tick_values(0, tokens[-1]) if tokens[0] <= t <= tokens[-1]]
    # By interpolation, not a factor: tokens a step may change during a run.
    top = axes.secondary_xaxis("top")
    top.set_ticks(np.interp(ticks, tokens, list(seen)), [human_count(t) for t in ticks])
    top.set_xlabel("tokens")


def _smoothed(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (about 1000 at most) and the median loss of about 4 % of the run around each.

    A median, so that one spike does not become a plateau; and a window that is centred and
    narrower near the start, so that the steep part neither lags nor flattens.
    """
    count = len(losses)
    centres = np.unique(np.linspace(0, count - 1, min(count, 1000)).astype(int))
    halves = np.minimum(centres, count // 50)
    medians = [np.median(losses[c - h : c + h + 1]) for c, h in zip(centres, halves, strict=True)]
    return centres, np.array(medians)


def _unigram_nats(run_dir: Path, validation: list[Record]) -> float | None:
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    summary = read_object(path)
    if wrong := mistyped(summary, SUMMARY):
        raise UserError(f"{path} is damaged: {wrong}")
    if isinstance(nats := summary.get("unigram_nats_per_token"), int | float):
        return float(nats)
    bits = summary.get("unigram_bits_per_byte")
    for record in reversed(validation):
        if bits is not None and record.get("bits_per_byte"):
            # loss / bits_per_byte = ln 2 * bytes per token, on the same validation text.
            return float(bits * record["loss"] / record["bits_per_byte"])
    return None


def save_figure(figure: Any, out: Path) -> Path:
    """Write a figure whole or not at all, in the format that the suffix names; the path written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")  # same suffix: it decides the format
    figure.savefig(partial)
    os.replace(partial, out)
    return out

"""The figures of a stream: the matrix of each method, and the scores of tasks over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.continual.results import Curves
from nlscale.continual.stream import Stream
from nlscale.telemetry.figures import CYCLE, STYLE, save_figure

MATRIX_FIGURE, CURVES_FIGURE = "matrix.png", "curves.png"
_CELL = 0.55, 0.36
"""Inches of a score in a matrix, across and down."""
_MOST_TICKS = 400


def draw_matrices(stream: Stream, plain: Mapping[str, Any], out: Path) -> Path:
    """Draw R of each method as a heat map, the mean over seeds, with the untrained model above.

    All have one scale of colours, of the scores of tasks that have been learned; the lightest is
    the best, and what is worse than all of them has the darkest.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    methods, tasks = plain["methods"], stream.tasks
    values = {name: np.array([m["before"], *m["matrix"]]) for name, m in methods.items()}
    below = np.tril_indices(len(tasks))
    learned = np.concatenate([each[1:][below] for each in values.values()])
    low, high = float(learned.min()), float(learned.max())
    lines, columns = _grid(len(methods))
    across = columns * (_CELL[0] * len(tasks) + 0.9) + 1.2
    down = lines * (_CELL[1] * (len(tasks) + 1) + 0.6)
    with rc_context({**STYLE, "axes.spines.right": True}):
        figure = Figure(figsize=(across, down), dpi=150, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        axes = grid.ravel()
        image = None
        for axis, (name, each) in zip(axes, values.items(), strict=False):
            colours = "viridis" if stream.metric.higher else "viridis_r"
            image = axis.imshow(each, cmap=colours, vmin=low, vmax=high, aspect="auto")
            axis.set_title(name, fontsize=10)
            axis.set_xticks(range(len(tasks)), tasks)
            axis.set_yticks(range(len(tasks) + 1), ["untrained", *tasks])
            axis.axhline(0.5, color="white", linewidth=2)
            for (i, j), value in np.ndenumerate(each):
                shade = (np.clip(value, low, high) - low) / max(high - low, 1e-12)
                dark = (shade if stream.metric.higher else 1 - shade) < 0.6
                axis.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
        for axis in axes[len(values) :]:
            axis.set_axis_off()
        for axis in grid[:, 0]:
            axis.set_ylabel("after task")
        assert image is not None, "there is a method"
        figure.colorbar(image, ax=list(axes), label=stream.metric.label, shrink=0.8, aspect=40)
        return save_figure(figure, out)


def draw_curves(stream: Stream, curves: Mapping[str, Mapping[str, Curves]], out: Path) -> Path:
    """Draw the score of each task over the steps, method by method, each seed thin and the mean
    thick; beneath, a tick at each update of each level, of the first seed.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines, columns = _grid(len(curves))
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 3.6 * lines), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2 * lines, columns, height_ratios=[4, 1] * lines, hspace=0.02)
        top: Any = None
        for number, (name, seeds) in enumerate(curves.items()):
            line, column = divmod(number, columns)
            scores = figure.add_subplot(grid[2 * line, column], sharey=top)
            top = top or scores
            ticks = figure.add_subplot(grid[2 * line + 1, column], sharex=scores)
            _draw_scores(scores, stream, list(seeds.values()))
            scores.set_title(name, fontsize=10)
            scores.tick_params(labelbottom=False)
            if column == 0:
                scores.set_ylabel(stream.metric.label)
            _draw_ticks(ticks, next(iter(seeds.values())).updates)
            ticks.set_xlabel("step")
        top.legend(fontsize=8, title="task", title_fontsize=8)
        return save_figure(figure, out)


def _grid(count: int) -> tuple[int, int]:
    """Lines and columns for so many methods."""
    columns = min(count, max(3, math.ceil(math.sqrt(count))))
    return -(-count // columns), columns


def _draw_scores(axis: Any, stream: Stream, seeds: list[Curves]) -> None:
    steps = sorted(set.intersection(*(set(each.scores) for each in seeds)))
    trained = [step for step in steps if step > 0] or steps
    for task, name in enumerate(stream.tasks):
        colour = CYCLE[task % len(CYCLE)]
        each = np.array([[one.scores[step][task] for step in trained] for one in seeds])
        if len(seeds) > 1:
            for one in each:
                axis.plot(trained, one, color=colour, linewidth=0.6, alpha=0.5)
        axis.plot(trained, each.mean(0), color=colour, linewidth=1.8, marker=".", label=name)
    for end in stream.ends[:-1]:
        axis.axvline(end, color="#8C8C8C", linewidth=0.8, linestyle=(0, (4, 2.5)))
    axis.grid(visible=True, axis="y")


def _draw_ticks(axis: Any, updates: Mapping[str, list[int]]) -> None:
    names = list(updates)
    for row, name in enumerate(names):
        steps = updates[name]
        shown = steps[:: -(-len(steps) // _MOST_TICKS)] if steps else []
        axis.eventplot(shown, lineoffsets=-row, linelengths=0.7, linewidths=0.5, color="#444444")
    axis.set_yticks([-row for row in range(len(names))], names, fontsize=7)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(0.7 - len(names), 0.7)

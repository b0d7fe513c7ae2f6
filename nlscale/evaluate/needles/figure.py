"""Heat maps of needles: length by depth, one for each model and kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.errors import UserError
from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.trained import Answer, Result
from nlscale.telemetry.figures import STYLE, save_figure

_ROW = 0.3
"""Inches of a depth, in which two lines of text have room."""
_BAR = "references found; below, the 95% interval in percent"


def draw(answers: Sequence[Answer], out: Path) -> None:
    """Draw a row of maps for each model, a map for each kind; each cell with its share in percent
    and the ends of its interval.

    Raises:
        UserError: none of the models was asked needles in text.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    answers = [answer for answer in answers if not answer.result["symbols"]]
    if not answers:
        raise UserError("needles of a task of symbols have no depth to draw; leave out --figure")
    kinds = list(dict.fromkeys(kind for answer in answers for kind in answer.result["kinds"]))
    lengths = max(len(answer.result["lengths"]) for answer in answers)
    depths = max(len(c["depths"]) for answer in answers for c in answer.result["cells"])
    height = max(2.1, _ROW * depths)
    size = (1.0 + (0.55 * lengths + 0.35) * len(kinds), 0.6 + height * len(answers))
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, size[0]), size[1]), dpi=160, layout="constrained")
        maps = figure.subplots(len(answers), len(kinds), squeeze=False, sharey=True)
        image = None
        names = [Path(answer.label).name for answer in answers]
        if len(set(names)) < len(names):
            names = [answer.label for answer in answers]
        for row, answer, name in zip(maps, answers, names, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                image = _map(axes, answer.result, kind) or image
            row[0].set_ylabel(f"{name}\n{answer.mixer}\n\ndepth", fontsize=9)
        for axes, kind in zip(maps[0], kinds, strict=True):
            axes.set_title(kind, fontsize=10)
        figure.supxlabel("length (tokens)", fontsize=10)
        if image is not None:
            bar = figure.colorbar(image, ax=maps, shrink=0.8, label=_BAR)
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        save_figure(figure, out)


def _map(axes: Any, result: Result, kind: str) -> Any:
    """The map of a kind; None where the model was not asked it."""
    cells = [cell for cell in result["cells"] if cell["kind"] == kind]
    if not cells:
        axes.set_axis_off()
        return None
    ends = sorted({d["to"] for cell in cells for d in cell["depths"]})
    values = np.full((len(ends), len(cells)), np.nan)
    intervals = {}
    for x, cell in enumerate(cells):
        for depth in cell["depths"]:
            y = ends.index(depth["to"])
            values[y, x] = depth["share"]
            intervals[y, x] = "{:.0f}-{:.0f}".format(*(100 * end for end in depth["interval"]))
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="bottom", fontsize=7, color=color)
            axes.text(x, y, intervals[y, x], ha="center", va="top", fontsize=5, color=color)
    axes.set_facecolor("#DDDDDD")  # where no sample had this depth
    axes.set_xticks(range(len(cells)), [shown(cell["length"]) for cell in cells], fontsize=8)
    axes.set_yticks(range(len(ends)), [f"{end:.0%}" for end in ends], fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image

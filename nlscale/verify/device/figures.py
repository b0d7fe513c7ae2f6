"""The figures of a device's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlscale.telemetry.figures import save_figure
from nlscale.verify.device.parts import SCANS, STEPS

# Okabe-Ito: told apart with every common form of colour blindness.
_COLOURS = {
    "hope": "#0072B2",
    "gated-delta": "#56B4E9",
    "attention": "#D55E00",
    "torch": "#8C8C8C",
}
_STYLE: dict[str, Any] = {"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}
_INCH = 0.42
"""Of height that a bar gets."""


_REHEARSAL = ", rehearsed at tiny sizes: no figure says anything of speed"


def draw_steps(found: Mapping[str, Any], out: Path) -> Path:
    """Tokens a second of every row of the parts `step`, a panel a size."""
    bars = {
        size.what: [
            (row, found[part]["tokens_per_second"])
            for row in size.rows
            if (part := f"step.{name}.{row}") in found
        ]
        for name, size in STEPS.items()
    }
    panels = {what: rows for what, rows in bars.items() if rows}

    def draw(axes: Any, rows: list[tuple[str, float]]) -> None:
        for place, (row, speed) in enumerate(rows):
            axes.barh(place, speed, color=_COLOURS[row], height=0.7)
            axes.text(speed, place, f" {speed:,.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row for row, _ in rows])

    title = "Whole training steps" + _rehearsal(found)
    return _panels(panels, draw, title, "tokens a second", out)


def _rehearsal(found: Mapping[str, Any]) -> str:
    return _REHEARSAL if found["device"]["sizes"] == "tiny" else ""


def draw_scans(found: Mapping[str, Any], out: Path) -> Path:
    """Forward and backward pass of every row of the parts `scan`, and their floors."""
    panels = {
        SCANS[name]: found[f"scan.{name}"]["rows"] for name in SCANS if f"scan.{name}" in found
    }

    def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
        for place, row in enumerate(rows):
            forward, backward = row["forward_ms"], row["backward_ms"]
            colour = _COLOURS[row["mixer"]]
            axes.barh(place, forward, color=colour, height=0.7)
            axes.barh(place, backward, left=forward, color=colour, alpha=0.55, height=0.7)
            total = f" {forward:.3g} + {backward:.3g}"
            axes.text(forward + backward, place, total, va="center", fontsize=9)
            floor = sum(
                max(row[f"flops_{way}_ms"], row[f"bytes_{way}_ms"])
                for way in ("forward", "backward")
            )
            axes.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
        names = [f"{row['mixer']}, {row['path']}" for row in rows]
        axes.set_yticks(range(len(rows)), names)

    label = "milliseconds, forward + backward (lighter); black: the floor of both"
    title = "The scan of a layer, beside softmax attention" + _rehearsal(found)
    return _panels(panels, draw, title, label, out)


def _panels(panels: Mapping[str, Any], draw: Any, title: str, label: str, out: Path) -> Path:
    """One below the other, a bar a row; the first row on top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    counts = [len(rows) for rows in panels.values()]
    with rc_context(_STYLE):
        height = _INCH * sum(counts) + 0.55 * len(counts) + 1.0
        figure = Figure(figsize=(9.0, height), dpi=160, layout="constrained")
        drawn = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
        for axes, (what, rows) in zip(drawn, panels.items(), strict=True):
            draw(axes, rows)
            axes.invert_yaxis()
            axes.margins(x=0.16)
            axes.set_xlim(left=0)
            axes.set_title(what, fontsize=10, loc="left")
            axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
            axes.set_axisbelow(True)
        drawn[-1].set_xlabel(label)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        return save_figure(figure, out)

"""The figure of a coordinate check: activations against width, standard beside muP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlscale.telemetry.figures import save_figure

_TITLES = {"standard": "standard parametrisation", "mup": "muP"}
_ROWS = {"size": "size of activations", "change": "their change since step 0"}
# Okabe-Ito: told apart with every common form of colour blindness; then once more, dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


def draw_coordinates(result: dict[str, Any], out: Path) -> Path:
    """Draw size and change of every part after the last step, relative to the narrowest model.

    Args:
        result: of `nlscale.bench.coords.check_coordinates`.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    style = {"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}
    widths, kinds = result["widths"], result["parametrisations"]
    with rc_context(style):
        figure = Figure(figsize=(9.0, 6.6), dpi=160, layout="constrained")
        panels = figure.subplots(len(_ROWS), len(kinds), sharex=True, sharey="row", squeeze=False)
        for row, (measure, label) in zip(panels, _ROWS.items(), strict=True):
            for axes, (kind, found) in zip(row, kinds.items(), strict=True):
                axes.axhline(1.0, color="#8C8C8C", linewidth=0.8)
                for i, (part, values) in enumerate(found["parts"].items()):
                    sizes = values[measure][-1]
                    relative = [s and sizes[0] and s / sizes[0] for s in sizes]
                    axes.plot(
                        widths, [float("nan") if r is None else r for r in relative],
                        color=_COLOURS[i % len(_COLOURS)], linestyle=_DASHES[i // len(_COLOURS)],
                        linewidth=1.5, marker="o", markersize=3, label=part,
                    )  # fmt: skip
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(widths, [str(width) for width in widths])
                axes.xaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
                if measure == "size":
                    axes.set_title(_TITLES[kind], fontsize=10)
                else:
                    axes.set_xlabel("width, d_model")
            row[0].set_ylabel(f"{label},\nrelative to width {widths[0]}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9
        )
        figure.suptitle(
            f"{result['mixer']} after {result['steps']} steps at learning rate "
            f"{result['learning_rate']:g}: flat where hyperparameters carry over",
            x=0.02, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        return save_figure(figure, out)

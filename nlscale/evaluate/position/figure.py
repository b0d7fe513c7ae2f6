"""Loss by position, as a figure: a curve a model, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path

from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.position.show import with_interval
from nlscale.evaluate.trained import Answer
from nlscale.telemetry.figures import CYCLE, STYLE, save_figure


def draw(answers: Sequence[Answer], out: Path) -> None:
    """Draw the loss of each range of the curve at its middle, over a logarithmic axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = all(answer.result["all"]["bits_per_byte"] for answer in answers)
    name = "bits_per_byte" if text else "loss"
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.8), dpi=160, layout="constrained")
        axes = figure.subplots()
        axes.spines["top"].set_visible(False)
        trained = dict.fromkeys(answer.result["trained_length"] for answer in answers)
        longest = max(answer.result["all"]["to"] for answer in answers)
        for length in trained:
            axes.axvline(length, color="#8C8C8C", linestyle=(0, (5, 3)), linewidth=1.0)
            offset, side = ((4, 5), "left") if 4 * length <= longest else ((-4, 5), "right")
            axes.annotate(
                f"trained at {shown(length)}", (length, 0.0), offset, ha=side,
                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8.5,
                color="#666666",
            )  # fmt: skip
        for index, answer in enumerate(answers):
            ranges = [one for one in answer.result["curve"] if one[name] is not None]
            middles = [(max(1, one["from"]) * one["to"]) ** 0.5 for one in ranges]
            values = [one[name]["value"] for one in ranges]
            color = CYCLE[index % len(CYCLE)]
            whole = with_interval(answer.result["all"][name])
            label = f"{answer.label} ({answer.mixer}): {whole} in all"
            axes.plot(middles, values, color=color, marker="o", markersize=3.5, label=label)
            # Of one context there is none: a gap in the band.
            ends = [one[name]["interval"] or (nan, nan) for one in ranges]
            axes.fill_between(
                middles, [e[0] for e in ends], [e[1] for e in ends], color=color,
                alpha=0.15, linewidth=0,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = [4**i for i in range(1, 16) if 4**i <= longest]
        axes.set_xticks(ticks, [shown(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("position in the context (tokens read before)")
        axes.set_ylabel("bits a byte" if text else "loss (nats a token)")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left")
        save_figure(figure, out)

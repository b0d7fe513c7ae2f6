"""A figure of data folders: how long their documents are, and what came of each source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlscale.config.units import human_count
from nlscale.data.look.facts import Facts
from nlscale.data.tally import shown
from nlscale.errors import UserError
from nlscale.telemetry.figures import CYCLE, STYLE, save_figure

_MOST_BARS = 24
_NAME = 28  # characters of a source


def draw_data(folders: Sequence[Facts], out: Path) -> Path:
    """Draw, of the train split of each folder, lengths of documents, and tokens by source.

    Args:
        folders: of `nlscale.data.look.facts.facts_of`.
        out: the image to write, in the format its suffix names.

    Returns:
        The path written.

    Raises:
        UserError: the lengths of no folder were read.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    train = {facts["directory"]: facts["splits"]["train"] for facts in folders}
    lengths = {name: split["lengths"] for name, split in train.items() if split["lengths"]}
    if not lengths:
        raise UserError("the lengths of no documents were read; leave out --no-lengths")
    bars = _bars(folders)
    with rc_context(STYLE):
        height = max(3.6, 1.4 + 0.26 * len(bars))
        figure = Figure(figsize=(10.0, height), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.spines["top"].set_visible(False)
        _draw_lengths(left, lengths)
        _draw_sources(right, bars)
        return save_figure(figure, out)


def _draw_lengths(axes: Any, folders: dict[str, Any]) -> None:
    """Shares by octave: of the documents, and, dashed, of the tokens that are in them."""
    for number, (name, lengths) in enumerate(folders.items()):
        octaves, color = lengths["octaves"], CYCLE[number % len(CYCLE)]
        edges = [octave["low"] for octave in octaves] + [2 * octaves[-1]["low"]]
        for figure, line, fill in (("documents", "-", 0.15), ("tokens", "--", 0.0)):
            of = max(1, sum(octave[figure] for octave in octaves))
            shares = [100 * octave[figure] / of for octave in octaves]
            label = figure if len(folders) == 1 else f"{shown(Path(name).name, _NAME)}, {figure}"
            axes.stairs(shares, edges, color=color, linestyle=line, linewidth=1.5, label=label)
            if fill and len(folders) == 1:
                axes.stairs(shares, edges, color=color, alpha=fill, fill=True)
    axes.set_xscale("log", base=2)
    longest = max(lengths["most"] for lengths in folders.values())
    ticks = [4**i for i in range(20) if 4**i <= 2 * longest]
    axes.set_xticks(ticks, [_power_of_two(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("% of all, by factors of two")
    axes.set_title("lengths of documents", loc="left")
    axes.grid(axis="y")
    axes.legend(fontsize=8.5)


def _draw_sources(axes: Any, bars: list[tuple[str, int]]) -> None:
    places = range(len(bars), 0, -1)
    axes.barh(places, [tokens for _, tokens in bars], color=CYCLE[0], height=0.7)
    total = max(1, sum(tokens for _, tokens in bars))
    for place, (_, tokens) in zip(places, bars, strict=True):
        axes.annotate(
            f"{human_count(tokens)} ({tokens / total:.0%})", (tokens, place), (4, 0),
            textcoords="offset points", va="center", fontsize=8.5, color="#444444",
        )  # fmt: skip
    axes.set_yticks(list(places), [name for name, _ in bars])
    axes.set_xlim(0, 1.25 * max(1, *(tokens for _, tokens in bars)))
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel("tokens of train")
    axes.set_title("by source", loc="left")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bars(folders: Sequence[Facts]) -> list[tuple[str, int]]:
    """Names and tokens of sources, the largest first; those beyond the most as one."""
    bars: list[tuple[str, int]] = []
    for facts in folders:
        name, split = Path(facts["directory"]).name, facts["splits"]["train"]
        parts = split.get("sources", [])
        if len(parts) < 2:  # or a version that did not count them wrote the index
            bars.append((name if len(folders) > 1 else _source(facts["sources"]), split["tokens"]))
            continue
        before = f"{name}: " if len(folders) > 1 else ""
        bars += [(before + _source([part["source"]]), part["tokens"]) for part in parts]
    bars.sort(key=lambda bar: -bar[1])
    rest = bars[_MOST_BARS:]
    if rest:
        bars[_MOST_BARS:] = [(f"{len(rest):,} others", sum(tokens for _, tokens in rest))]
    return [(shown(name, _NAME), tokens) for name, tokens in bars]


def _power_of_two(number: int) -> str:
    """Such as 64, 16 Ki, 4 Mi."""
    for shift, unit in ((20, "Mi"), (10, "Ki")):
        if number >= 1 << shift:
            return f"{number >> shift:,} {unit}"
    return str(number)


def _source(names: Sequence[str]) -> str:
    """What a source is called: the end of its path, where it is one."""
    return " ".join(name.rstrip("/").rpartition("/")[2] or name for name in names)

"""The sources of a mixture, as panels below the loss of a run's figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nlscale.telemetry.panels import Lines, Panel, Point

_MOST_LINES = 14
"""Colours and dashes that can be told apart."""
_POINTS = 40
"""Of a line, at most: what lies between them is averaged."""


def panels_of_sources(records: Iterable[Mapping[str, Any]]) -> tuple[list[Panel], int]:
    """Loss in training and in validation, and epochs, of each source; none without a mixture.

    Args:
        records: of metrics.jsonl, of any kind.

    Returns:
        The panels, and how many lines are too many to be read, and so left out.
    """
    found: dict[tuple[str, str], Lines] = {}
    names: dict[str, None] = {}  # one order in all panels, so that colours agree
    for record in records:
        for name, source in (record.get("sources") or {}).items():
            names[name] = None
            for key in ("loss", "epochs"):
                value = source.get(key)
                if isinstance(value, int | float) and math.isfinite(value):
                    point = int(record["step"]), float(record.get("tokens") or 0), float(value)
                    lines = found.setdefault((record["kind"], key), {})
                    lines.setdefault(name, []).append(point)
    panels, left = [], 0
    for (kind, key), title, unit in _PANELS:
        unsorted = found.get((kind, key), {})
        lines = {name: unsorted[name] for name in names if name in unsorted}
        kept = list(lines.items())[:_MOST_LINES]
        left += len(lines) - len(kept)
        if kept:
            panels.append(Panel(title, unit, {name: _thinned(line) for name, line in kept}))
    return panels, left


_PANELS = [
    (("train", "loss"), "training loss by source", "nats per token"),
    (("validation", "loss"), "validation loss by source", "nats per token"),
    (("train", "epochs"), "read of each source", "epochs"),
]


def _thinned(line: list[Point]) -> list[Point]:
    """Means of neighbours, and the last point as it is, where there are too many."""
    size = -(-len(line) // _POINTS)
    if size == 1:
        return line
    parts = [line[i : i + size] for i in range(0, len(line) - 1, size)]
    means = [tuple(sum(each) / len(part) for each in zip(*part, strict=True)) for part in parts]
    return [*((round(step), tokens, value) for step, tokens, value in means), line[-1]]

"""From a grid of runs to what can be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nlscale.errors import UserError
from nlscale.scaling.compare.paired import Paired, paired
from nlscale.scaling.compare.runs import Cell, Grid, same

_ALIKE = 0.02
"""By which parameters or tokens of two cells may differ and still count as equal."""


@dataclass(frozen=True)
class Contrast:
    """One value of a factor beside its baseline."""

    factor: str
    value: str
    baseline: str
    paired: Paired
    over: str = ""
    """The other factors, over whose values each pair is averaged."""


@dataclass(frozen=True)
class Comparison:
    """What the runs say."""

    metric: str
    level: float
    grid: Grid
    contrasts: tuple[Contrast, ...]
    unequal: tuple[str, ...]
    """A line for parameters, or tokens, that are not equal in all cells."""
    effect: float | None

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it.

        Keys:
            metric, level: of all intervals together; factors, paired_by, pairs (their values).
            cells: one a combination of factors: factors, values (in the order of pairs), mean,
                parameters, tokens, seconds_per_step (median of the runs; null: unknown),
                state_bytes (of a sequence; null: a mixer does not say), runs (folders).
            contrasts: factor, value, baseline, over, differences (value - baseline, a pair each),
                mean, deviation, interval_level, interval (Student's), bootstrap (null of fewer than
                5 pairs), verdict (`lower`, `higher`, `undecided`), visible_effect (that so many
                pairs show with a power of 80%), pairs_for_effect (null without --effect).
            also_differ: other keys that differ between cells, with their values by cell.
            unequal, left_out: lines.
        """
        return {
            "metric": self.metric,
            "level": self.level,
            "factors": list(self.grid.factors),
            "paired_by": list(self.grid.paired_by),
            "pairs": [list(pair) for pair in self.grid.pairs],
            "cells": [self._cell(cell) for cell in self.grid.cells],
            "contrasts": [self._contrast(contrast) for contrast in self.contrasts],
            "also_differ": {
                key: {" ".join(cell): list(values) for cell, values in by_cell.items()}
                for key, by_cell in self.grid.also.items()
            },
            "unequal": list(self.unequal),
            "left_out": list(self.grid.left_out),
        }

    def seconds_per_step(self, cell: Cell) -> float | None:
        """Median of its runs; None where one does not say."""
        runs = [self.grid.runs[cell][pair].seconds_per_step for pair in self.grid.pairs]
        known = [seconds for seconds in runs if seconds is not None]
        return statistics.median(known) if len(known) == len(runs) else None

    def _cell(self, cell: Cell) -> dict[str, Any]:
        runs = [self.grid.runs[cell][pair] for pair in self.grid.pairs]
        values = self.grid.values(cell)
        return {
            "factors": dict(zip(self.grid.factors, cell, strict=True)),
            "values": values,
            "mean": sum(values) / len(values),
            "parameters": runs[0].parameters,
            "tokens": runs[0].tokens,
            "seconds_per_step": self.seconds_per_step(cell),
            "state_bytes": runs[0].state_bytes,
            "runs": [str(run.folder) for run in runs],
        }

    def _contrast(self, contrast: Contrast) -> dict[str, Any]:
        found = contrast.paired
        return {
            "factor": contrast.factor,
            "value": contrast.value,
            "baseline": contrast.baseline,
            "over": contrast.over,
            "differences": list(found.differences),
            "mean": found.mean,
            "deviation": found.deviation,
            "interval_level": found.level,
            "interval": found.interval and list(found.interval),
            "bootstrap": found.resampled and list(found.resampled),
            "verdict": found.verdict,
            "visible_effect": found.visible(),
            "pairs_for_effect": self.effect and found.pairs_for(self.effect),
        }


def compare(
    grid: Grid,
    metric: str,
    level: float,
    baselines: Mapping[str, str],
    effect: float | None = None,
) -> Comparison:
    """Every value of every factor beside the baseline of that factor.

    With several factors each pair is first averaged over the values of the others, so that a
    contrast is the main effect of its factor.

    Args:
        grid: of the runs.
        metric: what it holds.
        level: of all intervals of the table together.
        baselines: by factor; the first value found where none is given.
        effect: how large a difference one wants to see, in the unit of the metric.

    Raises:
        UserError: a baseline that no run has, or combinations of factors that are missing.
    """
    values = {
        factor: list(dict.fromkeys(cell[i] for cell in grid.cells))
        for i, factor in enumerate(grid.factors)
    }
    _check_full(grid, values)
    for factor, baseline in baselines.items():
        if factor not in values:
            raise UserError(f"--baseline {factor}={baseline}: {factor} is not in --by")
        if not any(same(baseline, value) for value in values[factor]):
            raise UserError(
                f"--baseline {factor}={baseline}: no run has it; there are "
                f"{', '.join(values[factor])}"
            )
    count = sum(len(of) - 1 for of in values.values())
    contrasts = []
    for place, (factor, of) in enumerate(values.items()):
        asked = baselines.get(factor, of[0])
        baseline = next(value for value in of if same(asked, value))
        beside = _averaged(grid, place, baseline)
        for value in of:
            if value == baseline:
                continue
            mine = _averaged(grid, place, value)
            differences = [x - y for x, y in zip(mine, beside, strict=True)]
            over = ", ".join(other for other in values if other != factor)
            found = paired(differences, level, count)
            contrasts.append(Contrast(factor, value, baseline, found, over))
    return Comparison(metric, level, grid, tuple(contrasts), _unequal(grid), effect)


def _averaged(grid: Grid, place: int, value: str) -> list[float]:
    """Of each pair, the mean over the cells that have this value of the factor."""
    cells = [grid.values(cell) for cell in grid.cells if cell[place] == value]
    return [sum(column) / len(cells) for column in zip(*cells, strict=True)]


def _check_full(grid: Grid, values: Mapping[str, list[str]]) -> None:
    wanted = 1
    for of in values.values():
        wanted *= len(of)
    if len(grid.cells) != wanted:
        raise UserError(
            f"the runs have {len(grid.cells)} of the {wanted} combinations of "
            f"{' and '.join(values)}; run the others, or compare by one of them at a time"
        )


def _unequal(grid: Grid) -> tuple[str, ...]:
    lines = []
    for name in ("parameters", "tokens"):
        by_cell = {
            cell: [getattr(grid.runs[cell][pair], name) for pair in grid.pairs]
            for cell in grid.cells
        }
        each = [value for values in by_cell.values() for value in values]
        if max(each) > (1 + _ALIKE) * min(each):
            said = ", ".join(f"{' '.join(cell)} {max(v):,.0f}" for cell, v in by_cell.items())
            lines.append(f"{name} are not equal: {said}")
    return tuple(lines)

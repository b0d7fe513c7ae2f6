"""Sweeps that first choose a setting: every value on one seed, the best on seeds of their own.

    search: {key: optimizer.learning_rate, values: [1e-3, 2e-3, 4e-3], seed: 1, length: 0.25}

For each combination of the other axes all values are tried on one seed, at part of the length, in
`search/` of the sweep's folder; the value of the lowest validation loss is the one that the runs
of the sweep have, on seeds that chose nothing: the best of several is best by luck as well, and
only a fresh seed does not know of that luck. `nlscale compare` leaves the runs of the search out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlscale.config.vocabulary import Purpose
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.spec import Search, Sweep
from nlscale.scaling.sweep.status import Status
from nlscale.telemetry.files import read_object, to_json
from nlscale.telemetry.files import replace as replace_file

FOLDER = "search"
DIVERGED = "diverged.json"
_SAYS_DIVERGED = "steps in a row were dropped"
"""What a run ends with that meets no finite loss; see `nlscale.train.dropped`."""
_SEED = "run.seed"

Choices = dict[str, list[tuple[str, float]]]
"""By combination of the other axes, the name of every value and its loss, the best first."""


def search_of(sweep: Sweep, search: Search) -> Sweep:
    """The sweep that tries the values, on one seed."""
    axes = {name: values for name, values in sweep.axes.items() if name != _SEED}
    return replace(
        sweep,
        folder=sweep.folder / FOLDER,
        common={**sweep.common, _SEED: search.seed, "run.purpose": Purpose.search.value},
        axes={**axes, search.key: search.values},
        share=search.length,
        search=None,
    )


def finals_of(sweep: Sweep, search: Search) -> Sweep:
    """The sweep itself, with every value; `chosen` says which of its runs are to be."""
    return replace(sweep, axes={**sweep.axes, search.key: search.values}, search=None)


def choices(
    search: Search, runs: list[Run], states: Mapping[str, Status], diverged: Collection[str]
) -> Choices | None:
    """What the runs of a search have found; None while some have not finished.

    Args:
        search: of the sweep.
        runs: that search.
        states: where they stand, by name.
        diverged: names of those that gave up because their steps were not finite: the worst.

    Raises:
        UserError: no value of a combination has a loss.
    """
    found: Choices = {}
    for run in runs:
        summary = states[run.name].summary
        if summary is None and run.name in diverged:
            summary = {"final_val_loss": None}
        if summary is None:
            return None
        loss: Any = summary["final_val_loss"]
        loss = loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
        found.setdefault(_others(run, search), []).append((run.axes[search.key], float(loss)))
    ranked = {others: sorted(tried, key=lambda each: each[1]) for others, tried in found.items()}
    for others, tried in ranked.items():
        if tried[0][1] == math.inf:
            raise UserError(
                f"no value of {search.key} has a loss of {others or 'all runs'}: all have "
                f"diverged; search others"
            )
    return ranked


def remember_diverged(folder: Path, failed: Mapping[str, str]) -> list[str]:
    """Which of the failed runs of a search diverged, now or before; they are not tried again.

    Args:
        folder: of the search; remembers them in `diverged.json`.
        failed: why, by name, of those that failed now.
    """
    path = folder / DIVERGED
    known: dict[str, str] = dict(read_object(path)) if path.exists() else {}
    new = {name: why for name, why in failed.items() if _SAYS_DIVERGED in why}
    if new:
        known |= new
        replace_file(path, (to_json(known, indent=1) + "\n").encode())
    return list(known)


def chosen(search: Search, runs: list[Run], found: Choices | None) -> list[Run]:
    """Those of `finals_of` whose value was among the best; before that is known, as many of them.

    Args:
        search: of the sweep.
        runs: of `finals_of`.
        found: by `choices`.
    """
    if found is None:
        first = [value.name for value in search.values[: search.keep]]
        return [run for run in runs if run.axes[search.key] in first]
    best = {others: [name for name, _ in tried[: search.keep]] for others, tried in found.items()}
    return [run for run in runs if run.axes[search.key] in best[_others(run, search)]]


def lines(search: Search, found: Choices) -> list[str]:
    """What was chosen, a line for each combination, and by how much."""
    said = []
    ends = (search.values[0].name, search.values[-1].name)
    for others, tried in found.items():
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in tried)
        edge = "; the best is at the end of what was tried" if tried[0][0] in ends else ""
        said.append(f"{search.key} of {others or 'all runs'}: {losses}{edge}")
    return said


def _others(run: Run, search: Search) -> str:
    """Its values on the other axes but the seed's."""
    kept = (value for axis, value in run.axes.items() if axis not in (search.key, _SEED))
    return "-".join(kept)

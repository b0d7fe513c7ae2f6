"""Sweeps that first choose a setting: every value on one seed, the best on seeds of their own.

    search: {key: optimizer.learning_rate, values: [1e-3, 2e-3, 4e-3], seed: 1, length: 0.25}

For each combination of the other axes all values are tried on one seed, at part of the length, in
`search/` of the sweep's folder; the value of the lowest validation loss is the one that the runs
of the sweep have, on seeds that chose nothing: the best of several is best by luck as well, and
only a fresh seed does not know of that luck. `nlscale compare` leaves the runs of the search out.

With `rounds: 3` the better half goes on to a round of twice the length, and again (successive
halving, Jamieson & Talwalkar 2016): runs of a later round begin from the stable phase of the one
before where their schedule has one, else anew. With `keep: 2` the best two are finalists; which is
first, the search alone says, in `finalists.json` (see `nlscale.scaling.compare.finalists`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nlscale.config.vocabulary import Purpose
from nlscale.errors import UserError
from nlscale.scaling.compare.finalists import SEARCH, Finalists
from nlscale.scaling.sweep.runs import Run, combinations
from nlscale.scaling.sweep.spec import ROUND, Search, Sweep
from nlscale.scaling.sweep.status import Status
from nlscale.scaling.sweep.values import Value
from nlscale.telemetry.files import read_object, to_json
from nlscale.telemetry.files import replace as replace_file

DIVERGED = "diverged.json"
_SAYS_DIVERGED = "steps in a row were dropped"
"""What a run ends with that meets no finite loss; see `nlscale.train.dropped`."""
_SEED = "run.seed"

Choices = dict[str, list[tuple[str, float]]]
"""By combination of the other axes, the name of every value and its loss, the best first."""


def rounds_of(sweep: Sweep, search: Search) -> list[Sweep]:
    """The sweeps that try the values on one seed, with every value; `goes_on` says which stay.

    All have one folder, and the runs of the first are called as those of a single one.
    """
    axes = {name: values for name, values in sweep.axes.items() if name != _SEED}
    axes[search.key] = search.values
    first = replace(
        sweep,
        folder=sweep.folder / SEARCH,
        common={**sweep.common, _SEED: search.seed, "run.purpose": Purpose.search.value},
        axes=axes,
        share=search.length,
        search=None,
    )
    later = [
        replace(
            first,
            axes={**axes, ROUND: [Value(f"round{number + 1}")]},
            share=search.length * 2**number,
        )
        for number in range(1, search.rounds)
    ]
    return [first, *later]


def finals_of(sweep: Sweep, search: Search) -> Sweep:
    """The sweep itself, with every value; `goes_on` says which of its runs are to be."""
    return replace(sweep, axes={**sweep.axes, search.key: search.values}, search=None)


def choices(
    search: Search, runs: list[Run], states: Mapping[str, Status], diverged: Collection[str]
) -> Choices | None:
    """What the runs of a round have found; None while some have not finished.

    Args:
        search: of the sweep.
        runs: of that round.
        states: where they stand, by name.
        diverged: names of those that gave up because their steps were not finite: the worst.

    Raises:
        UserError: fewer values of a combination have a loss than are kept.
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
        found.setdefault(_others(run.axes, search), []).append((run.axes[search.key], float(loss)))
    ranked = {others: sorted(tried, key=lambda each: each[1]) for others, tried in found.items()}
    for others, tried in ranked.items():
        if tried[0][1] == math.inf:
            raise UserError(
                f"no value of {search.key} has a loss of {others or 'all runs'}: all have "
                f"diverged; search others"
            )
        if len(usable := _with_a_loss(tried)) < search.keep:
            raise UserError(
                f"{len(usable)} of the values of {search.key} have a loss of "
                f"{others or 'all runs'}, the others have diverged, and search.keep is "
                f"{search.keep}: search others, or keep {len(usable)}"
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


def goes_on(search: Search, found: Choices | None, most: int, axes: Mapping[str, str]) -> bool:
    """Whether a value was among the best so far; before that is known, among the first as many.

    A value that diverged goes nowhere.

    Args:
        search: of the sweep.
        found: by `choices`, of the round before.
        most: values of a combination that go on.
        axes: the values of a run of the next of `rounds_of`, or of `finals_of`, by their names.
    """
    if found is None:
        return axes[search.key] in [value.name for value in search.values[:most]]
    return axes[search.key] in _with_a_loss(found[_others(axes, search)])[:most]


def finalists(sweep: Sweep, search: Search, found: Choices) -> Finalists:
    """The runs of `finals_of` that go on, and the places that the last round gave them.

    Args:
        sweep: as read.
        search: of it.
        found: by `choices`, of the last round.
    """
    ranked = {others: [name for name, _ in tried] for others, tried in found.items()}
    wanted = partial(goes_on, search, found, search.keep)
    return Finalists(
        search.key,
        {
            name: ranked[_others(axes, search)].index(axes[search.key]) + 1
            for name, axes, _ in combinations(finals_of(sweep, search), wanted)
        },
    )


def waiting(search: Search, number: int) -> str:
    """What is said of a round, or after the last of the finals, that waits for what is before it.

    Args:
        search: of the sweep.
        number: rounds before it.
    """
    before = "The search" if search.rounds == 1 else f"Round {number} of {search.rounds}"
    after = f"the best {search.keep}"
    if number < search.rounds:
        after = f"the better {search.tried[number]} at {search.length * 2**number:.0%} of a run"
    return (
        f"{before} has not finished: after it come, with {after} of its "
        f"{search.tried[number - 1]} values,"
    )


def lines(search: Search, found: Choices, number: int) -> list[str]:
    """What a round has chosen, a line for each combination, and by how much.

    Args:
        search: of the sweep.
        found: by `choices`, of that round.
        number: of the round, from 1.
    """
    said = []
    ends = (search.values[0].name, search.values[-1].name)
    last = number == search.rounds
    begins = f"round {number} of {search.rounds}: " if search.rounds > 1 else ""
    for others, tried in found.items():
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in tried)
        at_end = last and tried[0][0] in ends
        edge = "; the best is at the end of what was tried" if at_end else ""
        said.append(f"{begins}{search.key} of {others or 'all runs'}: {losses}{edge}")
    return said


def _with_a_loss(tried: list[tuple[str, float]]) -> list[str]:
    return [name for name, loss in tried if loss < math.inf]


def _others(axes: Mapping[str, str], search: Search) -> str:
    """The values on the other axes but the seed's."""
    kept = (value for axis, value in axes.items() if axis not in (search.key, _SEED, ROUND))
    return "-".join(kept)

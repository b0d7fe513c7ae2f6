"""The runs that are compared: their metric, their keys, and which of them are pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nlscale.config import recipe
from nlscale.config.pattern import text_of
from nlscale.config.vocabulary import Config, Purpose
from nlscale.errors import UserError
from nlscale.model.sizes import state_bytes
from nlscale.scaling.compare.finalists import Finalists
from nlscale.scaling.compare.metric import metric_of, number, seconds_per_step
from nlscale.scaling.compare.question import FINALIST
from nlscale.telemetry.figures import SUMMARY_FILE
from nlscale.train.folder import CONFIG_FILE, Run, read_summary

_NO_FACTOR = ("run.dir", "checkpoint.", "resume.", "wandb.", "timeouts.", "run.max_restarts")
"""Keys that say where a run goes, not where to: they may differ from run to run."""

_AS_MIXER = "as its mixer says"

Cell = tuple[str, ...]
"""The values of the factors, as text."""


@dataclass(frozen=True)
class Measured:
    """A finished run."""

    folder: Path
    keys: Mapping[str, str]
    """Its configuration, flat, as text."""
    chosen: Mapping[str, str]
    """Those of them that do not follow from its mixer."""
    value: float
    """Its metric."""
    parameters: float
    tokens: float
    searched: bool
    """Whether it was one of a search: what it found has chosen a setting."""
    searched_key: str | None
    """The key whose value a search has chosen for it; None: no search has."""
    seconds_per_step: float | None = None
    """Median over its steps; None: it does not say. What ran beside it has slowed it."""
    state_bytes: int | None = None
    """That its mixers carry of a sequence of its length; None: one of them does not say."""


def find_runs(paths: Iterable[Path], metric: str) -> tuple[list[Measured], list[str]]:
    """Finished runs in folders, or folders of them.

    Returns:
        The runs, and lines on those that are left out; one for all of the same reason.

    Raises:
        UserError: no finished run there, a file that is damaged, or a run without that metric.
    """
    found: list[Measured] = []
    left_out: list[str] = []
    wrong: dict[str, list[str]] = {}  # by what it says of any folder
    given = list(paths)
    for path in given:
        if not path.is_dir():
            raise UserError(f"{path} is no folder; give runs, or a folder of runs")
        alone = (path / CONFIG_FILE).exists()
        folders = [path] if alone else sorted(p.parent for p in path.rglob(CONFIG_FILE))
        for folder in folders:
            summary = read_summary(folder / SUMMARY_FILE)
            if summary is None:
                left_out.append(f"{folder} is left out: it has not finished")
                continue
            try:
                found.append(_measured(folder, summary, metric))
            except UserError as error:
                wrong.setdefault(str(error).replace(str(folder), ""), []).append(str(error))
    if not found:
        where = ", ".join(map(str, given))
        if wrong:
            raise UserError(next(iter(wrong.values()))[0])
        raise UserError(f"no finished run in {where}; {len(left_out)} have not finished")
    for first, *others in wrong.values():
        left_out.append(f"left out{f', as {len(others)} others' if others else ''}: {first}")
    searched = [run for run in found if run.searched]
    if len(searched) < len(found):
        left_out += _one_line(searched)
        found = [run for run in found if not run.searched]
        _refuse_seeds_that_chose(found, searched)
    else:
        raise UserError(
            "all of these runs are of a search, whose best is best by luck as well; compare runs "
            "of seeds that chose nothing"
        )
    return found, left_out


def _one_line(searched: Sequence[Measured]) -> list[str]:
    """Of all that a search has run: a sweep's are many, and nobody asks for any of them."""
    if len(searched) < 2:
        return [f"{run.folder} is left out: it was part of a search" for run in searched]
    first = searched[0].folder
    return [f"{len(searched)} runs are left out: they were part of a search ({first} and others)"]


def _refuse_seeds_that_chose(found: Sequence[Measured], searched: Sequence[Measured]) -> None:
    """Of the same sweep, whose searches lie in a folder of its own."""
    chose = {(run.folder.parent.parent, run.keys["run.seed"]) for run in searched}
    for run in found:
        if (run.folder.parent, run.keys["run.seed"]) in chose:
            raise UserError(
                f"{run.folder} has seed {run.keys['run.seed']}, by which the search beside it has "
                f"chosen: it says nothing of what was chosen; leave it out, or use another seed"
            )


def values_of(runs: Sequence[Measured], key: str) -> list[str]:
    """The distinct values of a key, in the order of the runs.

    Raises:
        UserError: no run has that key.
    """
    there = list(dict.fromkeys(run.keys[key] for run in runs if key in run.keys))
    if not there:
        raise _no_such(key)
    return there


def _no_such(key: str) -> UserError:
    if key == FINALIST:
        return UserError(
            "none of these runs is a finalist of a search, or the search was of a version that "
            "kept no places: the same `nlscale sweep` writes them"
        )
    return UserError(recipe.unknown_key(key))


def where(runs: Sequence[Measured], key: str, value: str) -> list[Measured]:
    """Those whose key has that value, numbers compared as such.

    Raises:
        UserError: no run has that key, or that value of it.
    """
    there = values_of(runs, key)
    chosen = [run for run in runs if key in run.keys and same(run.keys[key], value)]
    if not chosen:
        raise UserError(f"no run has {key}={value}; there are {', '.join(there)}")
    return chosen


def _measured(folder: Path, summary: Mapping[str, Any], metric: str) -> Measured:
    config = Run(folder).config
    keys = keys_of(config)
    finalists = Finalists.read(folder.parent)
    place = finalists.places.get(folder.name) if finalists else None
    if place is not None:
        keys[FINALIST] = str(place)
    return Measured(
        folder=folder,
        keys=keys,
        chosen={key: value for key, value in keys.items() if value != _implied(keys).get(key)},
        value=metric_of(folder, summary, metric),
        parameters=number(folder, summary, "parameters"),
        tokens=number(folder, summary, "tokens"),
        seconds_per_step=seconds_per_step(folder, summary),
        state_bytes=state_bytes(config),
        searched=keys["run.purpose"] == Purpose.search.value,
        searched_key=finalists.key if finalists and place is not None else None,
    )


def _implied(keys: Mapping[str, str]) -> Mapping[str, str]:
    """What its mixer says where a recipe leaves the memory's keys open."""
    return _keys_of_mixer(keys["model.mixer"], keys["model.pattern"])


@cache
def _keys_of_mixer(mixer: str, pattern: str) -> Mapping[str, str]:
    mixers = [f"model.mixer={mixer}", f"model.pattern={pattern}"]
    config = recipe.load(None, ["data.dir=none", *mixers], trusted=True).config
    said = flat(recipe.to_plain(config))
    return {key: value for key, value in said.items() if key.startswith("model.memory.")}


def keys_of(config: Config) -> dict[str, str]:
    """A configuration as runs are compared by it: flat, each level's keys too, and a pattern as a
    person writes it."""
    plain = recipe.to_plain(config)
    plain["model"]["pattern"] = text_of(plain["model"])
    levels = plain["levels"].pop("spectrum")
    plain["levels"]["spectrum"] = {str(number): level for number, level in enumerate(levels)}
    return flat(plain)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Keys by dotted name, values as text, as recipes write them."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def same(one: str, other: str) -> bool:
    """Whether two texts are the same value; 1e-3 and 0.001 are, and a pattern in another order."""
    if one[:1] + other[:1] == "[[":
        try:
            return bool(yaml.safe_load(one) == yaml.safe_load(other))
        except yaml.YAMLError:
            return one == other
    return _as_number(one) == _as_number(other)


@dataclass(frozen=True)
class Grid:
    """Runs by cell and pair."""

    factors: tuple[str, ...]
    paired_by: tuple[str, ...]
    runs: Mapping[Cell, Mapping[Cell, Measured]]
    """By the values of the factors, and of what pairs."""
    pairs: tuple[Cell, ...]
    """Those that every cell has."""
    left_out: tuple[str, ...]
    """A line for each run of a pair that some cell lacks."""
    also: Mapping[str, Mapping[Cell, tuple[str, ...]]]
    """Other keys that differ between cells, and their values there."""

    @property
    def cells(self) -> list[Cell]:
        return list(self.runs)

    def values(self, cell: Cell) -> list[float]:
        """The metric of its runs, in the order of `pairs`."""
        return [self.runs[cell][pair].value for pair in self.pairs]


def grid(runs: Sequence[Measured], factors: Sequence[str], paired_by: Sequence[str]) -> Grid:
    """Deal runs out to cells and pairs.

    Raises:
        UserError: a key that no run has, a factor that does not vary, two runs in one place, or no
            pair that every cell has.
    """
    names = sorted({key for run in runs for key in run.keys})
    for key in (*factors, *paired_by):
        if key not in names:
            raise _no_such(key)
    for key in factors:
        values = {run.keys.get(key) for run in runs}
        if len(values) < 2:
            raise UserError(
                f"--by {key}: every run has {values.pop()}; there is nothing to compare"
            )
    dealt: dict[Cell, dict[Cell, Measured]] = {}
    for run in runs:
        cell = tuple(run.keys.get(key, "null") for key in factors)
        pair = tuple(run.keys.get(key, "null") for key in paired_by)
        if pair in dealt.setdefault(cell, {}):
            raise _two_in_one_place(dealt[cell][pair], run, names, (*factors, *paired_by))
        dealt[cell][pair] = run
    pairs = [pair for pair in next(iter(dealt.values())) if all(pair in c for c in dealt.values())]
    if not pairs:
        have = "; ".join(
            f"{_shown(factors, cell)} has {' / '.join(_shown(paired_by, pair) for pair in of)}"
            for cell, of in dealt.items()
        )
        raise UserError(f"no {' and '.join(paired_by)} is in every cell: {have}")
    left_out = tuple(
        f"{run.folder} is left out: another cell has no run with {_shown(paired_by, pair)}"
        for of in dealt.values()
        for pair, run in of.items()
        if pair not in pairs
    )
    also = {}
    for key in names:
        if key in (*factors, *paired_by) or key.startswith(_NO_FACTOR):
            continue
        by_cell = {
            cell: tuple(dict.fromkeys(of[pair].chosen.get(key, _AS_MIXER) for pair in pairs))
            for cell, of in dealt.items()
        }
        if len(set(by_cell.values())) > 1 or any(len(values) > 1 for values in by_cell.values()):
            also[key] = by_cell
    order = sorted(pairs, key=lambda pair: tuple(map(_as_number, pair)))
    return Grid(tuple(factors), tuple(paired_by), dealt, tuple(order), left_out, also)


def _two_in_one_place(
    one: Measured, other: Measured, names: Sequence[str], used: Sequence[str]
) -> UserError:
    differ = [
        key
        for key in names
        if key not in used
        and not key.startswith(_NO_FACTOR)
        and one.chosen.get(key) != other.chosen.get(key)
    ]
    fix = f"they differ in {', '.join(differ)}: name it in --by" if differ else "they are the same"
    return UserError(
        f"{one.folder} and {other.folder} have the same {' and '.join(used)}; {fix}, or leave one "
        f"out"
    )


def _shown(keys: Sequence[str], values: Cell) -> str:
    return ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))


def _as_number(text: str) -> tuple[float, str]:
    """Numbers in their order, before all other texts; equal for two spellings of one number."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text

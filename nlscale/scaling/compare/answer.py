"""From a question and folders of runs to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nlscale.errors import UserError
from nlscale.scaling.compare.comparison import Comparison, compare
from nlscale.scaling.compare.finalists import refuse_choices
from nlscale.scaling.compare.question import FINALIST, Question
from nlscale.scaling.compare.runs import find_runs, grid, values_of, where


@dataclass(frozen=True)
class Answer:
    """One table for each combination of values of the keys that set them apart, or a single one."""

    tables: Mapping[str, Comparison]
    """By these values; by an empty text where there is one alone."""
    left_out: Sequence[str]
    """A line for each run that has no place in any."""


def answer(paths: Sequence[Path], question: Question) -> Answer:
    """Compare finished runs in folders.

    All intervals of all tables hold together with the level.

    Raises:
        UserError: see `find_runs`, `refuse_choices`, `grid` and `compare`.
    """
    runs, left_out = find_runs(paths, question.metric)
    searched = {run.searched_key for run in runs if run.searched_key is not None}
    several = len({run.keys[FINALIST] for run in runs if FINALIST in run.keys}) > 1
    picked = several and FINALIST not in question.only and bool(searched & {*question.only})
    for key, value in question.only.items():
        runs = where(runs, key, value)
    named = (*question.by, *question.paired_by)
    parts = {"": runs}
    for key in question.each:
        if key in named:
            raise UserError(f"--each {key} is in --by or --paired-by as well")
        parts = {
            ", ".join(filter(None, (title, _title(key, value)))): where(of, key, value)
            for title, of in parts.items()
            for value in values_of(of, key)
        }
    for of in parts.values():
        places = [run.keys.get(FINALIST) for run in of]
        refuse_choices(places, searched, (*named, *question.each), picked)
    grids = {value: grid(of, question.by, question.paired_by) for value, of in parts.items()}
    tables = {
        value: compare(
            dealt,
            question.metric,
            1 - (1 - question.level) / len(grids),
            question.baselines,
            question.effect,
        )
        for value, dealt in grids.items()
    }
    return Answer(tables, left_out)


def _title(key: str, value: str) -> str:
    """The value alone, but for a number that says nothing by itself."""
    return f"{FINALIST} {value}" if key == FINALIST else value

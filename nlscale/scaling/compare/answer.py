"""From a question and folders of runs to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nlscale.errors import UserError
from nlscale.scaling.compare.comparison import Comparison, compare
from nlscale.scaling.compare.question import Question
from nlscale.scaling.compare.runs import find_runs, grid, values_of, where


@dataclass(frozen=True)
class Answer:
    """One table for each value of the key that sets them apart, or a single one."""

    tables: Mapping[str, Comparison]
    """By that value; by an empty text where there is one alone."""
    left_out: Sequence[str]
    """A line for each run that has no place in any."""


def answer(paths: Sequence[Path], question: Question) -> Answer:
    """Compare finished runs in folders.

    All intervals of all tables hold together with the level.

    Raises:
        UserError: see `find_runs`, `grid` and `compare`.
    """
    runs, left_out = find_runs(paths, question.metric)
    for key, value in question.only.items():
        runs = where(runs, key, value)
    if question.each is None:
        parts = {"": runs}
    else:
        if question.each in (*question.by, *question.paired_by):
            raise UserError(f"--each {question.each} is in --by or --paired-by as well")
        parts = {v: where(runs, question.each, v) for v in values_of(runs, question.each)}
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

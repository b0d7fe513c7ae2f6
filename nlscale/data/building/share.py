"""A share of a build that a task of Slurm does: some units of a pass, or what is done once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nlscale.data.building import passes
from nlscale.data.building.finish import finish
from nlscale.data.building.settle import settled_of
from nlscale.data.building.work import INDEX, SURVEY, TOKENS, Work, kept
from nlscale.errors import UserError

SETTLE, FINISH = "settle", "finish"
_Share = Callable[[Work, list[int], int], object]


def _survey(work: Work, numbers: list[int], workers: int) -> None:
    passes.survey_units(work, numbers, workers, progress=True)


def _settle(work: Work, numbers: list[int], workers: int) -> None:
    passes.settle_all(work, workers, progress=True)


def _write(work: Work, numbers: list[int], workers: int) -> None:
    passes.write_units(work, numbers, workers, progress=True)


def _finish(work: Work, numbers: list[int], workers: int) -> None:
    finish(work)


STEPS: dict[str, _Share] = {SURVEY: _survey, SETTLE: _settle, TOKENS: _write, FINISH: _finish}
"""Of a build, in their order; those of a pass are shared by tasks, the others are one task."""
SHARED = (SURVEY, TOKENS)


def steps_left(work: Work) -> list[str]:
    """The steps that a build has still to do. Raises OSError."""
    if work.noted(INDEX) is not None:
        return [FINISH]
    return [TOKENS, FINISH] if settled_of(work) is not None else list(STEPS)


def share(out: Path, step: str, task: int, of: int, workers: int) -> None:
    """Do a share of a step.

    Args:
        out: the data folder that is built.
        step: one of `STEPS`.
        task, of: which of how many shares, from 1.
        workers: processes.

    Raises:
        UserError: as `nlscale.data.build.build`; also where a step before is not done.
    """
    work = Work(out)
    if step not in STEPS:
        raise UserError(f"unknown step {step!r}; the steps of a build are {', '.join(STEPS)}")
    with kept(work):
        STEPS[step](work, passes.largest_first(work)[task - 1 :: of], workers)


def progress_of(out: Path) -> str:
    """How many units each pass has finished, and for how long the last one goes on, in words."""
    work = Work(out)
    total = len(work.plan.units)
    step = TOKENS if settled_of(work) is not None else SURVEY
    ended = sorted(path.stat().st_mtime for path in work.folder.glob(f"{step}-*[0-9]"))
    words = f"{len(ended):,} of {total:,} units are through the pass {step!r}"
    if len(ended) > 1 and len(ended) < total:
        left = (ended[-1] - ended[0]) / (len(ended) - 1) * (total - len(ended))
        words += f", which takes another {left / 60:,.1f} minutes at the rate so far"
    return words

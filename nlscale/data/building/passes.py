"""The passes of a build one after the other, in this process and its workers."""

from __future__ import annotations

from nlscale.data.building.duplicates import hashed_bytes, ranges
from nlscale.data.building.finish import finish
from nlscale.data.building.options import DROP
from nlscale.data.building.pool import run_pass
from nlscale.data.building.settle import documents_of, settle, settled_of, surveys_of
from nlscale.data.building.work import DUPLICATES, INDEX, SURVEY, TOKENS, Work
from nlscale.data.index import Index
from nlscale.data.progress import phase


def run_all(work: Work, workers: int, progress: bool) -> list[Index]:
    """Do what is left of a build: the index of each data folder.

    Raises as `nlscale.data.build.build`, and OSError.
    """
    if work.noted(INDEX) is None:
        if settled_of(work) is None:
            survey_units(work, largest_first(work), workers, progress)
        settle_all(work, workers, progress)
        write_units(work, largest_first(work), workers, progress)
    return finish(work)


def largest_first(work: Work) -> list[int]:
    """The units, those that take longest first: so that no process is left alone with one."""
    units = sorted(work.plan.units, key=lambda unit: (-unit.bytes, unit.number))
    return [unit.number for unit in units]


def survey_units(work: Work, numbers: list[int], workers: int, progress: bool) -> None:
    """The first pass over some of the units. Raises as `run_pass`."""
    total = sum(work.plan.units[number].bytes for number in numbers)
    with phase("reading", total, progress) as advance:
        run_pass(work, SURVEY, numbers, workers, advance)


def settle_all(work: Work, workers: int, progress: bool) -> None:
    """What is done once between the passes, when all units are surveyed. Raises as `run_pass`."""
    surveys = surveys_of(work)
    if settled_of(work) is None and work.plan.options.duplicates == DROP:
        _find_duplicates(work, documents_of(surveys), workers, progress)
    settle(work, surveys, progress)


def write_units(work: Work, numbers: list[int], workers: int, progress: bool) -> None:
    """The second pass over some of the units. Raises as `run_pass`."""
    total = sum(work.made(SURVEY, number)["bytes"] for number in numbers)
    with phase("tokenizing", total, progress) as advance:
        run_pass(work, TOKENS, numbers, workers, advance)


def _find_duplicates(work: Work, documents: int, workers: int, progress: bool) -> None:
    numbers = list(range(ranges(documents)))
    with phase("finding duplicates", hashed_bytes(work), progress, "ranges") as advance:
        run_pass(work, DUPLICATES, numbers, workers, advance)

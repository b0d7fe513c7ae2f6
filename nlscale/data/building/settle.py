"""Between the passes: whether too much was lost, the split, and the tokenizer."""

from __future__ import annotations

from typing import Any

from nlscale.data.building import duplicates
from nlscale.data.building.options import DROP
from nlscale.data.building.survey import Survey, sample_of
from nlscale.data.building.work import SETTLED, Work
from nlscale.data.folder import clear
from nlscale.data.hashed import sha256_of
from nlscale.data.progress import say
from nlscale.data.tokenizer import (
    TOKENIZER_NAME,
    ByteTokenizer,
    Tokenizer,
    train_bpe,
)


def surveys_of(work: Work) -> list[Survey]:
    """What the units of each data folder have together.

    Raises:
        UserError: a unit has not been surveyed, too much was lost, or there is no text for both
            splits.
        OSError: the disk does.
    """
    surveys = [Survey(work, folder) for folder in range(len(work.plan.folders))]
    for survey in surveys:
        survey.losses.check(work.plan.options.max_lost)
        survey.settle()
    return surveys


def settle(work: Work, surveys: list[Survey], progress: bool) -> dict[str, Any]:
    """Make the tokenizer, clear the data folders, and return what the second pass is to know.

    Nothing is done where that has been done.

    Raises:
        UserError: the text is too small for the tokenizer, or without duplicates for both splits.
        OSError: the disk does.
    """
    if (settled := settled_of(work)) is not None:
        return settled
    options = work.plan.options
    drops = options.duplicates == DROP
    ranges = duplicates.ranges(documents_of(surveys)) if drops else 0
    for survey in surveys:
        survey.settle_without(ranges)
    encoder = _tokenizer(work, surveys, progress)
    for folder in work.folders:
        clear(folder)
        encoder.save(folder)
    settled = {
        "ranges": ranges,
        "hashes": duplicates.surveyed_hashes(work) if drops else None,
        "folders": [_settled(survey) for survey in surveys],
        "tokenizer": sha256_of(work.folders[0] / TOKENIZER_NAME),
    }
    work.note(SETTLED, settled)
    return settled


def _settled(survey: Survey) -> dict[str, Any]:
    """What the second pass is to know of a data folder."""
    return {
        "threshold": survey.threshold,
        "masked": survey.masked,
        "documents": survey.documents,
        "bytes": survey.bytes,
        "empty": survey.empty,
        "skipped": survey.losses.skipped(),
        "lost_files": survey.losses.lost_files(),
        "left_out": survey.losses.left_out(),
    }


def documents_of(surveys: list[Survey]) -> int:
    """Of all data folders, duplicates among them."""
    return sum(survey.documents for survey in surveys)


def settled_of(work: Work) -> dict[str, Any] | None:
    """What was settled; None where nothing was, or a tokenizer has gone. Raises OSError."""
    settled: dict[str, Any] | None = work.noted(SETTLED)
    if settled is None:
        return None
    try:
        there = {sha256_of(folder / TOKENIZER_NAME) for folder in work.folders}
    except FileNotFoundError:
        return None
    return settled if there == {settled["tokenizer"]} else None


def _tokenizer(work: Work, surveys: list[Survey], progress: bool) -> Tokenizer:
    options = work.plan.options
    if options.trains is None:
        return work.given() or ByteTokenizer()
    sample = sample_of(work, surveys)
    if progress:
        say(f"training {options.tokenizer} on {len(sample):,} documents")
    return train_bpe(sample, options.trains, options.vocabulary_multiple)

"""Between the passes: whether too much was lost, the split, and the tokenizer."""

from __future__ import annotations

from typing import Any

from nlscale.data.building import duplicates
from nlscale.data.building.options import DROP
from nlscale.data.building.survey import Survey
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


def survey_of(work: Work) -> Survey:
    """What the units have together.

    Raises:
        UserError: a unit has not been surveyed, too much was lost, or there is no text for both
            splits.
        OSError: the disk does.
    """
    survey = Survey(work)
    survey.losses.check(work.plan.options.max_lost)
    survey.settle()
    return survey


def settle(work: Work, survey: Survey, progress: bool) -> dict[str, Any]:
    """Make the tokenizer, clear the folder, and return what the second pass is to know.

    Nothing is done where that has been done.

    Raises:
        UserError: the text is too small for the tokenizer.
        OSError: the disk does.
    """
    if (settled := settled_of(work)) is not None:
        return settled
    options = work.plan.options
    drops = options.duplicates == DROP
    encoder = _tokenizer(work, survey, progress)
    clear(work.out)
    encoder.save(work.out)
    settled = {
        "threshold": survey.threshold,
        "masked": survey.masked,
        "documents": survey.documents,
        "bytes": survey.bytes,
        "empty": survey.empty,
        "ranges": duplicates.ranges(survey.documents) if drops else 0,
        "hashes": duplicates.surveyed_hashes(work) if drops else None,
        "skipped": survey.losses.skipped(),
        "lost_files": survey.losses.lost_files(),
        "left_out": survey.losses.left_out(),
        "tokenizer": sha256_of(work.out / TOKENIZER_NAME),
    }
    work.note(SETTLED, settled)
    return settled


def settled_of(work: Work) -> dict[str, Any] | None:
    """What was settled; None where nothing was, or its tokenizer has gone. Raises OSError."""
    settled: dict[str, Any] | None = work.noted(SETTLED)
    try:
        same = settled and settled["tokenizer"] == sha256_of(work.out / TOKENIZER_NAME)
    except FileNotFoundError:
        return None
    return settled if same else None


def _tokenizer(work: Work, survey: Survey, progress: bool) -> Tokenizer:
    options = work.plan.options
    if options.trains is None:
        return work.given() or ByteTokenizer()
    sample = survey.sample()
    if progress:
        say(f"training {options.tokenizer} on {len(sample):,} documents")
    return train_bpe(sample, options.trains, options.vocabulary_multiple)

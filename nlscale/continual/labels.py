"""Accuracy by the likelihood of labels: what a text is said to be, of all that there are.

The data are labelled where records have a prompt and a completion, which is the label: the tokens
of a document that count, and the separator after them. A model is asked of each held-out document
how likely each label of the stream is after its prompt; the likeliest is what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlscale.data import Samples
from nlscale.errors import UserError

Ids = tuple[int, ...]
Nats = Callable[[NDArray[np.int64], NDArray[np.bool_]], NDArray[np.float64]]
"""Of rows of tokens [n, length + 1], and which count as targets: -log p of each row, [n]."""
_MOST_LABELS = 1000
_ROWS = 2048
"""That are asked for at a time."""


class Example(NamedTuple):
    """A labelled document."""

    prompt: Ids
    label: Ids
    """With the separator, which no other label goes on after."""


def examples_of(samples: Samples) -> list[Example]:
    """The labelled documents of a split, in their order.

    Raises:
        UserError: it has none.
    """
    shards = samples.shards
    counts = shards.read_mask(0, shards.tokens)
    ids = shards.read(0, shards.tokens)
    if counts is None:
        counts = np.zeros(len(ids), bool)
    found, begin = [], 0
    for end in np.flatnonzero(ids == shards.separator) + 1:
        counted = np.flatnonzero(counts[begin:end])
        if len(counted) and counted[0]:
            first = begin + int(counted[0])
            found.append(Example(tuple(ids[begin:first].tolist()), tuple(ids[first:end].tolist())))
        begin = int(end)
    if not found:
        raise UserError(
            f"{shards.directory} has no held-out document that is labelled, and metric: accuracy "
            f"is of labels; build it from records with prompt and completion, and hold out more"
        )
    return found


def labels_of(examples: Sequence[Example]) -> list[Ids]:
    """All labels that there are, each once, in the order of their ids.

    Raises:
        UserError: they are too many to ask for each.
    """
    found = sorted({one.label for one in examples})
    if len(found) > _MOST_LABELS:
        raise UserError(
            f"metric: accuracy asks for each label, and the tasks have {len(found):,}; they are "
            f"{_MOST_LABELS:,} at most, such as names of classes"
        )
    return found


def accuracy(
    examples: Sequence[Example], labels: Sequence[Ids], length: int, separator: int, nats: Nats
) -> float:
    """The share of examples whose own label is the likeliest, of equal ones the first; NaN where
    what the model says is not finite.

    Args:
        examples: at least one.
        labels: to choose from.
        length: tokens of a sequence; of a prompt for which and the longest label that is too short
            the end is read, the same for all labels.
        separator: fills rows up, behind all that counts.
        nats: asks the model.

    Raises:
        UserError: a label fills a sequence.
    """
    longest = max(map(len, labels))
    if longest >= length:
        raise UserError(
            f"a label is {longest} tokens, and a sequence {length}: nothing is left of the prompt; "
            f"use a longer data.sequence_length, or names of classes"
        )
    room = length + 1 - longest
    asked = [(one.prompt[-room:] + label, len(label)) for one in examples for label in labels]
    found = []
    for first in range(0, len(asked), _ROWS):
        some = asked[first : first + _ROWS]
        rows = np.full((len(some), length + 1), separator, np.int64)
        counts = np.zeros(rows.shape, bool)
        for row, count, (ids, label) in zip(rows, counts, some, strict=True):
            row[: len(ids)] = ids
            count[len(ids) - label : len(ids)] = True
        found.append(nats(rows, counts))
    of_all = np.concatenate(found).reshape(len(examples), len(labels))
    if not np.isfinite(of_all).all():
        return math.nan
    said = of_all.argmin(1)
    right = [labels[place] == one.label for place, one in zip(said, examples, strict=True)]
    return sum(right) / len(right)

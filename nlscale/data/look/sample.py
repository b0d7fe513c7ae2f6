"""Samples as training reads them, cut where documents end and where tokens begin to count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nlscale.data.reader import BatchReader, Samples
from nlscale.data.shards import TokenShards


@dataclass(frozen=True)
class Piece:
    """Tokens of a sample that follow one another and are of one kind.

    Fields: `start`, the first one's place in the sample; `ids`, int64 [tokens]; `border`, whether
    they are separators; `counts`, whether they count as targets.
    """

    start: int
    ids: NDArray[np.int64]
    border: bool
    counts: bool


@dataclass(frozen=True)
class Sample:
    """One sample: its `number` in the order it is read in, which `sample` of the split it is, its
    S + 1 `ids`, int64, and which of them count as targets (`counts`, bool; of those the first is
    the target of the sample before).
    """

    number: int
    sample: int
    ids: NDArray[np.int64]
    counts: NDArray[np.bool_]

    def pieces(self, separator: int) -> list[Piece]:
        """The sample, cut; in order."""
        border = self.ids == separator
        kind = 2 * border + self.counts
        cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]
        return [
            Piece(a, self.ids[a:b], bool(border[a]), bool(self.counts[a]))
            for a, b in pairwise(cuts)
        ]


def samples_of(
    shards: TokenShards, sequence_length: int, seed: int, count: int
) -> Iterator[Sample]:
    """The first samples of a split, as a run reads them.

    Those of train in the order of a run whose `run.seed` is `seed`; others in the order in which
    they lie there, in which an evaluation reads them.

    Raises:
        UserError: the split has too few tokens for one.
    """
    samples = Samples(shards, sequence_length)
    reader = BatchReader(samples, seed)
    everything = np.ones(sequence_length + 1, dtype=np.bool_)
    for number in range(min(count, len(samples))):
        sample = reader.order[number] if shards.split == "train" else number
        mask = samples.mask(sample)
        yield Sample(number, sample, samples[sample], everything if mask is None else mask)

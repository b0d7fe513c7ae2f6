"""How long documents are: exact counts, of which there are few however many documents there are."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


class Octave(TypedDict):
    """Documents of `tokens` [low, 2 low): how many, and how many tokens they have together.

    The first octave has those of 0 and 1 tokens.
    """

    low: int
    documents: int
    tokens: int


class LengthFigures(TypedDict):
    """Lengths of documents in tokens, without their separators.

    `quantiles` by share, such as "0.5": the smallest length that at least this share of the
    documents does not exceed. `octaves` are those from the shortest document to the longest.
    """

    documents: int
    mean: float
    least: int
    most: int
    quantiles: dict[str, int]
    octaves: list[Octave]


class Lengths:
    """How many documents there are of each length.

    T tokens have documents of less than sqrt(2 T) different lengths: it stays small.

    Args:
        least: shorter ones are not counted.
    """

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self._counts: dict[int, int] = {}

    def add(self, length: int, count: int = 1) -> None:
        """Count documents of one length."""
        if length >= self.least:
            self._counts[length] = self._counts.get(length, 0) + count

    def add_all(self, lengths: NDArray) -> None:
        """Count a document of each length, [documents]."""
        values, counts = np.unique(lengths, return_counts=True)
        for length, count in zip(values.tolist(), counts.tolist(), strict=True):
            self.add(length, count)

    def merge(self, other: Lengths) -> None:
        """Count those of another, too."""
        for length, count in other._counts.items():
            self.add(length, count)

    def figures(self) -> LengthFigures | None:
        """What is said of them; None: there are none."""
        if not self._counts:
            return None
        lengths = np.array(sorted(self._counts), dtype=np.int64)
        counts = np.array([self._counts[n] for n in lengths.tolist()], dtype=np.int64)
        before = np.cumsum(counts)
        documents = int(before[-1])
        ranks = [max(1, int(np.ceil(share * documents))) for share in QUANTILES]
        found = lengths[np.searchsorted(before, ranks)].tolist()
        return LengthFigures(
            documents=documents,
            mean=float((lengths * counts).sum()) / documents,
            least=int(lengths[0]),
            most=int(lengths[-1]),
            quantiles=dict(zip(map(str, QUANTILES), found, strict=True)),
            octaves=_octaves(lengths, counts),
        )


def _octaves(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> list[Octave]:
    octave = [max(1, n).bit_length() - 1 for n in lengths.tolist()]
    first, size = octave[0], octave[-1] - octave[0] + 1
    totals: Any = np.zeros((size, 2), dtype=np.int64)
    np.add.at(totals, np.array(octave) - first, np.stack([counts, counts * lengths], axis=1))
    return [
        Octave(low=1 << (first + i), documents=documents, tokens=tokens)
        for i, (documents, tokens) in enumerate(totals.tolist())
    ]

"""Packing documents whole into samples of one length, by best fit.

"Fewer Truncations Improve Language Modeling" (https://arxiv.org/abs/2404.10830): of a window of
documents, the longest first, each goes into the sample with the least room that is enough
(best-fit decreasing). What is left of a sample is separators that do not count.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Sample = tuple[NDArray[Any], NDArray[np.bool_]]
"""The token ids of a sample and which of them count as targets, each [S]."""


class _Piece(NamedTuple):
    """Ids of a document, [count], which of them count, [count], and the bytes of text of these."""

    ids: NDArray[Any]
    counts: NDArray[np.bool_]
    bytes: int
    first: int
    """Of its first token, if that counts."""


WINDOW_SAMPLES = 1024
"""Samples that a window of documents fills, unless `MOST_WINDOW_TOKENS` are fewer: the room into
which no document of it fits is small beside so many."""
MOST_WINDOW_TOKENS = 1 << 24
"""In a window, which is held in memory; those of one sample, where it has more."""
MOST_WINDOW_PIECES = 1 << 17
"""Documents in a window: short ones take more memory than their tokens do."""


def window_of(sample_tokens: int) -> int:
    """Tokens in a window of samples of that length."""
    return max(sample_tokens, min(WINDOW_SAMPLES * sample_tokens, MOST_WINDOW_TOKENS))


class Packer:
    """Makes samples of documents, a window of them at a time, in the order of the stream.

    Documents of more than S tokens are cut into pieces of S; the last piece is packed as a document
    is, unless it is the separator alone, which would end nothing there and is left out. The samples
    of a window come in the order in which the first document of each came, and so do the documents
    in a sample: nothing about lengths shows in either. The same documents in the same order give
    the same samples.

    The first token of a sample does not count. As a target it belongs to the sample before, where
    its document is not. Nor does the first token of a piece that goes on with a document, wherever
    in a sample it stands: what comes before it there is another document.

    Args:
        sample_tokens: S, the tokens of a sample, at least 1.
        separator: the id that fills a sample up.
        window: tokens of a window: once that many are held, or `MOST_WINDOW_PIECES` documents, they
            are packed; None: `window_of` S.

    Fields: `samples` (so far), `cut` (documents of several pieces), `unended` (documents without
    a separator, as a sample ends with their text), `padding` (tokens that fill up),
    `counted_bytes` (of text, that the tokens which count stand for).

    Raises:
        ValueError: S or the window is below 1.
    """

    def __init__(self, sample_tokens: int, separator: int, window: int | None = None) -> None:
        self.window = window_of(sample_tokens) if window is None else window
        if min(sample_tokens, self.window) < 1:
            raise ValueError(f"samples of {sample_tokens} tokens and a window of {self.window}")
        self.samples = self.cut = self.unended = self.padding = self.counted_bytes = 0
        self._size, self._separator = sample_tokens, separator
        self._pieces: list[_Piece] = []
        self._held = 0

    def taken(self, ids: NDArray[Any]) -> int:
        """Tokens of a document that are packed: not its separator where that fills no sample."""
        end = len(ids)
        alone = end > 1 and (end - 1) % self._size == 0 and ids[-1] == self._separator
        return end - 1 if alone else end

    def add(
        self,
        ids: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        sizes: NDArray[np.int64] | None = None,
    ) -> Iterator[Sample]:
        """Take a document, and give the samples of a window that it has filled.

        Args:
            ids: of the document, its separator among them, [count]; samples are of their dtype.
            mask: [count], which of them count; None: all.
            sizes: [count], bytes of text that each stands for; None: of none.
        """
        sizes = np.zeros(len(ids), dtype=np.int64) if sizes is None else sizes
        mask = np.ones(len(ids), dtype=np.bool_) if mask is None else mask
        end = self.taken(ids)
        self.cut += end > self._size
        self.unended += end < len(ids)
        for start in range(0, end, self._size):
            piece = slice(start, min(end, start + self._size))
            counts = mask[piece]
            if start:
                counts = counts.copy()
                counts[0] = False
            of_each = sizes[piece] * counts
            self._pieces.append(_Piece(ids[piece], counts, int(of_each.sum()), int(of_each[0])))
        self._held += end
        if self._held >= self.window or len(self._pieces) >= MOST_WINDOW_PIECES:
            yield from self.close()

    def close(self) -> Iterator[Sample]:
        """The samples of what is held: nothing is, after it."""
        pieces, self._pieces, self._held = self._pieces, [], 0
        for numbers in best_fit([len(ids) for ids, *_ in pieces], self._size):
            yield self._sample([pieces[number] for number in numbers])

    def _sample(self, pieces: list[_Piece]) -> Sample:
        ids = np.full(self._size, self._separator, dtype=pieces[0].ids.dtype)
        counts = np.zeros(self._size, dtype=np.bool_)
        end = 0
        for piece in pieces:
            start, end = end, end + len(piece.ids)
            ids[start:end], counts[start:end] = piece.ids, piece.counts
            self.counted_bytes += piece.bytes
        counts[0] = False
        self.counted_bytes -= pieces[0].first
        self.samples += 1
        self.padding += self._size - end
        return ids, counts


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Best-fit decreasing: which pieces share a bin.

    Pieces of a length are taken in their order; of bins with the same room, the one that was begun
    first is. O(n log n) comparisons for n pieces.

    Args:
        lengths: of the pieces, each from 1 to `size`.
        size: of a bin.

    Returns:
        For each bin the numbers of its pieces, rising; bins by their first piece.
    """
    rooms: list[tuple[int, int]] = []  # sorted: room, number of the bin; full ones are not in it
    bins: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[number]
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, chosen = size, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(place)
        bins[chosen].append(number)
        if room > length:
            insort(rooms, (room - length, chosen))
    return sorted(sorted(numbers) for numbers in bins)

"""Which tokens of a document count as targets: spans of its text, and the tokens that they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MASK, PROMPT, COMPLETION = "mask", "prompt", "completion"
"""Fields of a record that say what counts: spans of its text, or its text in two parts."""

Spans = tuple[tuple[int, int], ...]
"""Characters [start, end) of a text that count, in any order; they may overlap."""


class SpansError(ValueError):
    """A mask that cannot be: why, and `kind`, the same for all that have this fault."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def spans_of(value: Any, characters: int) -> Spans | None:
    """The spans that a record's mask names; None where it is null, as if there were none.

    Args:
        value: what a file has there.
        characters: of the text.

    Raises:
        SpansError: it is no list of pairs of whole numbers, or leads out of the text.
    """
    if value is None:
        return None
    if not isinstance(value, list) or any(not _is_pair(pair) for pair in value):
        raise SpansError("mask not spans", f"its {MASK!r} is no list of spans [start, end)")
    spans = []
    for number, pair in enumerate(value):
        if any(not _is_whole(bound) for bound in pair):
            why = f"span {number} of its {MASK!r} is not of whole numbers"
            raise SpansError("mask not whole numbers", why)
        start, end = map(int, pair)
        if start > end:
            why = f"span {number} of its {MASK!r} ends at {end:,}, before it starts at {start:,}"
            raise SpansError("mask reversed", why)
        if start < 0 or end > characters:
            why = (
                f"span {number} of its {MASK!r} is {start:,} to {end:,}, "
                f"its text has {characters:,} characters"
            )
            raise SpansError("mask outside the text", why)
        spans.append((start, end))
    return tuple(spans)


def normalized(spans: Spans | None, characters: int) -> Spans | None:
    """The same for all spans of a text that count the same: in order, apart, and not empty.

    None where all of the text counts.

    Args:
        spans: None: all of it does.
        characters: of the text.
    """
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans or ()):
        if start == end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return None if spans is None or found == [(0, characters)] else tuple(found)


def tokens_that_count(
    text: str, spans: Spans, ids: ArrayLike, byte_lengths: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each token of a document counts, and the separator after it: bool [tokens + 1].

    A token counts if any of its characters is in a span, also one that is only a part of such a
    character. The separator counts if the last character does.

    Args:
        text: of the document, not empty.
        spans: of it.
        ids: its tokens, [tokens].
        byte_lengths: UTF-8 bytes that each id stands for, [vocabulary].

    Raises:
        ValueError: the tokens do not stand for the text.
    """
    counts = _characters(len(text), spans)
    of_bytes = counts if text.isascii() else np.repeat(counts, _widths(text))
    before = np.concatenate([[0], np.cumsum(of_bytes)])
    lengths = byte_lengths[np.asarray(ids)]
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] != len(of_bytes):
        raise ValueError(f"tokens stand for other than the {len(of_bytes):,} bytes of their text")
    return np.append(before[ends] > before[ends - lengths], counts[-1])


def tokens_at_that_count(
    characters: int, spans: Spans, at: list[tuple[int, int]]
) -> NDArray[np.bool_]:
    """As `tokens_that_count`, of tokens that do not stand for bytes: bool [tokens + 1].

    Args:
        characters: of the text, at least 1.
        spans: of it.
        at: characters [start, end) of the text that each token was made of, [tokens]; one that was
            made of none does not count.
    """
    counts = _characters(characters, spans)
    before = np.concatenate([[0], np.cumsum(counts)])
    starts, ends = np.array(at, dtype=np.int64).reshape(-1, 2).T
    return np.append(before[ends] > before[starts], counts[-1])


def sizes_at(text: str, at: list[tuple[int, int]]) -> NDArray[np.int64]:
    """UTF-8 bytes of a text that each token was made of, [tokens]: together all of the text.

    Those of a character that several tokens were made of are the first one's, and those of which
    none was made the next one's, or the last one's.

    Args:
        text: of the document.
        at: as of `tokens_at_that_count`, at least one.
    """
    ends = np.maximum.accumulate(np.array([end for _, end in at], dtype=np.int64))
    ends[-1] = len(text)
    before = np.concatenate([[0], np.cumsum(_widths(text))])
    return np.diff(before[ends], prepend=0)


def _characters(count: int, spans: Spans) -> NDArray[np.bool_]:
    """Whether each character is in a span."""
    edges = np.zeros(count + 1, dtype=np.int64)
    for start, end in spans:
        edges[start] += 1
        edges[end] -= 1
    return np.cumsum(edges[:-1]) > 0


def _widths(text: str) -> NDArray[np.int64]:
    """UTF-8 bytes of each character."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.searchsorted([0x80, 0x800, 0x10000], points, side="right") + 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _is_whole(value: Any) -> bool:
    # whole numbers of JSON are read as floats
    return type(value) is int or (type(value) is float and value.is_integer())

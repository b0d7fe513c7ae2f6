"""Reading every byte of shards once, side by side: what each holds, and its sha256."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlscale.data.index import MASKED_FORMAT, Index, Shard
from nlscale.data.look.lengths import Lengths
from nlscale.data.progress import Advance
from nlscale.data.verified import altered, state_of
from nlscale.errors import UserError

_CHUNK = 8 << 20
"""Bytes that a thread reads at a time, about; a block at least."""


class Scan:
    """What a shard holds.

    A document ends with its separator; of packed data, it or its piece does with the sample too,
    and what fills a sample up are no documents.

    Args:
        start: place in the split of the shard's first token.
        length: tokens of a sample of packed data; None: they are not packed.

    Fields: `tokens`; `counted`, those that count as targets; `largest` id; `sha256` of the file,
    empty unless it was asked for; `separators`; `ends`, how often a document ends; `lengths` of
    those between two ends; `first`, the tokens before the first end, and `last`, those after the
    last (all, where there is none): parts of documents that began, or go on, in other shards.
    """

    def __init__(self, start: int = 0, length: int | None = None) -> None:
        self.tokens = self.counted = self.separators = self.ends = self.first = self.last = 0
        self.largest = -1
        self.sha256 = ""
        self.lengths = Lengths(least=0 if length is None else 1)
        self._start, self._length = start, length

    def add(self, ids: NDArray, counted: int, separator: int) -> None:
        """The next tokens, of which so many count as targets."""
        at = np.flatnonzero(ids == separator)
        ends, begins = at, at + 1
        if self._length is not None:
            place = self._start + self.tokens
            cuts = np.arange(-place % self._length, len(ids), self._length)
            ends, begins = np.sort(np.append(ends, cuts)), np.sort(np.append(begins, cuts))
        if len(ends):
            before = self.last + int(ends[0])
            if self.ends:
                self.lengths.add(before)
            else:
                self.first = before
            self.lengths.add_all(ends[1:] - begins[:-1])
            self.last = len(ids) - int(begins[-1])
        else:
            self.last += len(ids)
        self.separators += len(at)
        self.ends += len(ends)
        self.tokens += len(ids)
        self.counted += counted
        self.largest = max(self.largest, int(ids.max()))


def scan_shards(
    directory: Path,
    index: Index,
    shards: Sequence[Shard],
    workers: int,
    advance: Advance,
    hashed: bool = False,
) -> Iterator[Scan | UserError]:
    """Read the shards of a split, side by side in threads: hashing and numpy leave them to run.

    Args:
        directory: the data folder.
        index: of it.
        shards: of a split.
        workers: threads.
        advance: is told of the bytes.
        hashed: whether to take their sha256.

    Yields what each holds, in their order, or why it cannot be read.
    """
    stopped, lock = threading.Event(), threading.Lock()

    def told(size: int, whole: int) -> None:
        with lock:
            advance(size, whole)
        if stopped.is_set():  # nobody hears why
            raise UserError("stopped")

    length = index["packed"]["length"] if "packed" in index else None
    starts = accumulate((shard["tokens"] for shard in shards), initial=0)

    def one(shard: Shard, start: int) -> Scan | UserError:
        try:
            return _scan(directory, index, shard, Scan(start, length), told, hashed)
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(one, shards, starts)
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _scan(
    directory: Path,
    index: Index,
    shard: Shard,
    scan: Scan,
    told: Callable[[int, int], None],
    hashed: bool,
) -> Scan:
    path = directory / shard["name"]
    state_of(directory, shard)  # it is there, and has its size
    try:
        with open(path, "rb", buffering=0) as raw:
            file = _File(raw, path, told, hashed)
            file.skip(_begin(index, shard))
            for data, whole, rest in _blocks(file, index, shard):
                ids, counted = _tokens(index, shard, data, whole, rest)
                scan.add(ids, counted, index["separator"])
            file.skip(shard["size_bytes"] - file.done)
            scan.sha256 = file.sha256()
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error}; restore or rebuild it") from error
    told(0, 1)
    return scan


class _File:
    """A file that is read from its beginning to its end, and hashed."""

    def __init__(
        self, raw: Any, path: Path, told: Callable[[int, int], None], hashed: bool
    ) -> None:
        self._raw, self._path, self._told = raw, path, told
        self._digest = hashlib.sha256() if hashed else None
        self.done = 0

    def read(self, size: int) -> memoryview:
        """The next bytes, so many. Raises UserError: there are fewer; OSError."""
        data = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            here = self._raw.readinto(data[filled:])
            if not here:
                raise altered(self._path, "it became shorter while it was read")
            filled += here
        if self._digest is not None:
            self._digest.update(data)
        self.done += size
        self._told(size, 0)
        return data

    def skip(self, size: int) -> None:
        """Read on, a little at a time."""
        for begin in range(0, size, _CHUNK):
            self.read(min(_CHUNK, size - begin))

    def sha256(self) -> str:
        """Of what was read, in hexadecimal; "" where it was not asked for."""
        return "" if self._digest is None else self._digest.hexdigest()


def _begin(index: Index, shard: Shard) -> int:
    """The byte at which what repeats with every block begins."""
    return shard["mask_offset"] if index["format"] == MASKED_FORMAT else shard["offset"]


def _blocks(file: _File, index: Index, shard: Shard) -> Iterator[tuple[memoryview, int, int]]:
    """Some blocks at a time: their bytes, how many are whole, tokens of the shorter one behind."""
    block, width = index["block_tokens"], np.dtype(index["dtype"]).itemsize
    stride, before = shard["stride"], shard["offset"] - _begin(index, shard)
    each, left = max(1, _CHUNK // max(1, stride)), shard["blocks"]
    while left > each:
        yield file.read(each * stride), each, 0
        left -= each
    # Behind the last block there is no whole stride.
    last = shard["tokens"] - (shard["blocks"] - 1) * block
    data = file.read((left - 1) * stride + before + last * width)
    yield (data, left, 0) if last == block else (data, left - 1, last)


def _tokens(
    index: Index, shard: Shard, data: memoryview, whole: int, rest: int
) -> tuple[NDArray, int]:
    """The ids of blocks, and how many of them count as targets; arguments as `_blocks` gives."""
    block, dtype = index["block_tokens"], np.dtype(index["dtype"]).newbyteorder("<")
    stride, before = shard["stride"], shard["offset"] - _begin(index, shard)
    parts, counted = [], 0
    for first, count, tokens in ((0, whole, block), (whole, 1, rest)):
        if not count or not tokens:
            continue
        begin, shape = first * stride, (count, tokens)
        ids = np.ndarray(shape, dtype, data, begin + before, (stride, dtype.itemsize))
        parts.append(ids.reshape(-1))
        if index["format"] == MASKED_FORMAT:
            mask = np.ndarray((count, -(-tokens // 8)), np.uint8, data, begin, (stride, 1))
            counted += int(np.unpackbits(mask, axis=1, count=tokens, bitorder="little").sum())
        else:
            counted += count * tokens
    return np.concatenate(parts), counted


def together(scans: Iterable[Scan]) -> Lengths:
    """The lengths of all documents of a split, of the scans of its shards in their order."""
    lengths, part = Lengths(), 0
    for scan in scans:
        if scan.ends:
            lengths.least = scan.lengths.least
            lengths.add(part + scan.first)
            lengths.merge(scan.lengths)
            part = 0
        part += scan.last
    if part:  # of a sample that a piece of a document fills to its end
        lengths.add(part)
    return lengths

"""Documents that are tokens already: Megatron's .bin and .idx, datatrove's .ds, and .npy.

Layouts, all little-endian but for .npy, which says its own:

- Megatron (megatron/core/datasets/indexed_dataset.py): PREFIX.bin holds ids, PREFIX.idx "MMIDIDX",
  two NUL bytes, version 1 (u64), a code of the ids' type (u8), the numbers of sequences S and of
  document bounds D (u64), then S lengths (i32), S offsets in bytes (i64) and D numbers of the first
  sequence of each document (i64), the last being S.
- datatrove (datatrove/pipeline/tokens/tokenizer.py): NAME.ds holds ids of 2 or 4 bytes,
  NAME.ds.index where each document ends in tokens (u64), NAME.ds.loss, if it is there, a byte a
  token that says whether it counts; the first line of NAME.ds.metadata, if it is there, is
  "TOKENIZER|BYTES OF AN ID".
- NAME.npy: an array of one dimension, with a separator behind each document.

A document ends before its separator, or where its index says: a separator within it makes it two.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlscale.data.encoders.base import Tokenizer
from nlscale.data.formats import base
from nlscale.data.formats.base import (
    Document,
    SourceFile,
    Tokens,
    UnreadableError,
    failed,
    left_out,
    too_large,
)
from nlscale.data.tally import shown
from nlscale.errors import UserError

NO_TOKENIZER = "tokens without their tokenizer"
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<QBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MOST_NAME = 1 << 12  # characters of a line in a .metadata
_BLOCK = 1 << 16  # entries of an index, or ids of a .npy, that are read at once


class _Found(NamedTuple):
    """Ids as they lie in a file, [count], and which of them count, [count]; None: too many."""

    ids: NDArray | None
    counted: NDArray[np.bool_] | None
    size: int


def read_tokens(file: SourceFile, tokenizer: Tokenizer | None) -> Iterator[Document]:
    """The documents of a file of tokens, whose texts are what the tokenizer makes of them.

    Args:
        tokenizer: that made them; None: it is not known, and the file is left out.

    Raises:
        UnreadableError: the file, or one that belongs to it, is damaged.
        UserError: the tokenizer has no token of such an id.
    """
    path = str(file.path)
    if tokenizer is None:
        why = "name the tokenizer that made them, as --tokenizer file:PATH/tokenizer.json"
        yield left_out(path, file.size, NO_TOKENIZER, why, file.size)
        return
    known, number = tokenizer.known(), 0
    form = _FORMATS[file.path.suffix.lower()]
    if why := form.is_none(file.path):
        yield left_out(
            path, file.size, f"{file.path.suffix.lower()} without tokens", why, file.size
        )
        return
    for found in form.read(file, tokenizer.separator):
        if found.ids is None:
            yield failed(f"{path}:{number}", found.size, "too large", f"it has {too_large()}")
            number += 1
            continue
        pieces = list(_pieces(found.ids, found.counted, tokenizer.separator))
        for ids, counted in pieces:
            name = f"{path}:{number}"
            number += 1
            _check(ids, known, tokenizer, name)
            text = tokenizer.text(ids)
            tokens = Tokens(ids.astype(tokenizer.dtype), counted)
            consumed = found.size // len(pieces)
            lossy = tokenizer.loses(ids, text)
            yield Document(name, text, text.encode(), consumed, tokens=tokens, lossy=lossy)


def _check(ids: NDArray, known: NDArray[np.bool_], tokenizer: Tokenizer, name: str) -> None:
    """Refuse ids of no token by a UserError: another tokenizer has made them."""
    if not len(ids) or (ids.min() >= 0 and ids.max() < len(known) and known[ids].all()):
        return
    wrong = next(i for i in ids.tolist() if not 0 <= i < len(known) or not known[i])
    raise UserError(
        f"{shown(name)} has the id {wrong:,}, and {tokenizer.name} has no such token "
        f"(its vocabulary has {tokenizer.vocabulary:,} ids); give the --tokenizer that made it"
    )


def _pieces(
    ids: NDArray, counted: NDArray[np.bool_] | None, separator: int
) -> Iterator[tuple[NDArray, NDArray[np.bool_] | None]]:
    """The documents in ids, each without the separator behind it, and with what counts of both."""
    start = 0
    for end in [*np.flatnonzero(ids == separator).tolist(), len(ids)]:
        if end == len(ids) and start == end and end:
            return  # the last one has its separator
        mask = None
        if counted is not None:
            mask = counted[start : end + 1]
            if end == len(ids):  # as its last token does
                mask = np.append(mask, mask[-1:] if len(mask) else True)
        yield ids[start:end], mask
        start = end + 1


def _megatron(file: SourceFile, separator: int) -> Iterator[_Found]:
    index = file.path.with_suffix(".idx")
    with open(file.path, "rb") as data, open(index, "rb") as table:
        table.seek(len(_MAGIC))
        version, code, sequences, bounds = _HEADER.unpack(_exactly(table, _HEADER.size, index))
        if version != 1 or code not in _TYPES:
            what = f"version {version}" if version != 1 else f"ids of type {code}"
            raise UnreadableError("another version", f"its index has {what}, which is not read")
        dtype, start = np.dtype(_TYPES[code]), len(_MAGIC) + _HEADER.size
        offsets = start + 4 * sequences
        documents = offsets + 8 * sequences
        if index.stat().st_size != documents + 8 * bounds or not bounds:
            raise _damaged(f"its index has not the size of {sequences:,} sequences")
        lengths = _Column(table, start, "<i4", sequences, index)
        pointers = _Column(table, offsets, "<i8", sequences, index)
        firsts = _Column(table, documents, "<i8", bounds, index)
        at = last = 0  # in bytes of ids, and in sequences
        for number, first in enumerate(firsts):
            if first < last or (number == 0 and first) or first > sequences:
                raise _damaged(f"document {number:,} of its index begins at sequence {first:,}")
            size = 0
            for _ in range(first - last):
                length = next(lengths)
                if length < 0 or next(pointers) != at + size:
                    raise _damaged("its index leaves out ids, or has them twice")
                size += length * dtype.itemsize
            at, last = at + size, first
            if number:
                yield _take(data, size, dtype, file.path)
        if last != sequences or data.read(1):
            raise _damaged("its index ends before its ids do")


def _datatrove(file: SourceFile, separator: int) -> Iterator[_Found]:
    index, losses = (Path(f"{file.path}{suffix}") for suffix in (".index", ".loss"))
    size, entries = file.path.stat().st_size, index.stat().st_size // 8
    with open(file.path, "rb") as data, open(index, "rb") as table:
        if not entries:
            if size:
                raise _damaged("its index names no document")
            return
        table.seek(8 * (entries - 1))
        count = int(np.frombuffer(_exactly(table, 8, index), "<u8")[0])
        width = _width(Path(f"{file.path}.metadata"), size // count if count else 2)
        if index.stat().st_size % 8 or width not in (2, 4) or width * count != size:
            raise _damaged(f"its index ends at {count:,} tokens, and it has {size:,} bytes")
        masked = losses.is_file()
        if masked and losses.stat().st_size != count:
            raise _damaged(f"{losses.name} has not a byte for each of {count:,} tokens")
        with open(losses if masked else file.path, "rb") as mask:
            at = 0
            for end in _Column(table, 0, "<u8", entries, index):
                if end < at:
                    raise _damaged("its index goes backwards")
                found = _take(data, (end - at) * width, np.dtype(f"<u{width}"), file.path)
                if masked and found.ids is None:
                    mask.seek(end)
                elif masked:
                    counted = np.frombuffer(_exactly(mask, end - at, losses), np.uint8) != 0
                    found = found._replace(counted=counted)
                at = end
                yield found


def _width(metadata: Path, otherwise: int) -> int:
    """Bytes of an id, which the first line of the metadata ends with; without any: `otherwise`.

    Versions that do not write it there have written ids of two bytes.
    """
    if not metadata.is_file():
        return otherwise
    with open(metadata, encoding="utf-8", errors="replace") as file:
        _, bar, width = file.readline(_MOST_NAME).strip().rpartition("|")
    if not bar:
        return 2
    if width not in ("2", "4"):
        raise _damaged(f"{metadata.name} says ids of {shown(width, 20)} bytes")
    return int(width)


def _numpy(file: SourceFile, separator: int) -> Iterator[_Found]:
    with open(file.path, "rb") as data:
        (left,), dtype = _array(data)
        parts: list[NDArray] = []
        size = 0
        while left > 0:
            here = min(left, _BLOCK)
            ids = np.frombuffer(_exactly(data, here * dtype.itemsize, file.path), dtype)
            left -= here
            start = 0
            for end in (np.flatnonzero(ids == separator) + 1).tolist():
                yield _joined(parts, ids[start:end], size)
                start, size, parts = end, 0, []
            rest = ids[start:]
            size += rest.nbytes
            if size <= base.LARGEST and len(rest):
                parts.append(rest)
        if size:
            yield _joined(parts, ids[:0], size)
        if data.read(1):
            raise _damaged("it has more than its header says")


def _is_no_index(path: Path) -> str:
    """Why the .idx beside a .bin is none of Megatron's; "" where it is."""
    with open(path.with_suffix(".idx"), "rb") as table:
        magic = table.read(len(_MAGIC))
    if len(magic) < len(_MAGIC) and _MAGIC.startswith(magic):
        raise _damaged("its index breaks off")
    return "" if magic == _MAGIC else "the .idx beside it is no index of Megatron's"


def _is_no_row(path: Path) -> str:
    """Why a .npy is no row of ids; "" where it is one."""
    with open(path, "rb") as data:
        shape, dtype = _array(data)
    row = len(shape) == 1 and dtype.kind in "iu"
    return "" if row else f"it is an array {shape} of {dtype}, not whole numbers in one dimension"


def _joined(parts: list[NDArray], last: NDArray, size: int) -> _Found:
    size += last.nbytes
    if size > base.LARGEST:
        return _Found(None, None, size)
    return _Found(np.concatenate([*parts, last]), None, size)


def _array(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a .npy; its data follow. Raises ValueError: it is none."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UnreadableError("another version", f"version {version} of .npy is not read")
    shape, _, dtype = read(file)
    return shape, dtype


class _Column:
    """Whole numbers that lie in a file one behind the other, read a block at a time."""

    def __init__(self, file: BinaryIO, start: int, dtype: str, count: int, path: Path) -> None:
        self._file, self._at, self._left, self._path = file, start, count, path
        self._dtype = np.dtype(dtype)
        self._block: Iterator[int] = iter(())

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        for value in self._block:
            return value
        if not self._left:
            raise StopIteration
        count = min(self._left, _BLOCK)
        self._file.seek(self._at)
        data = _exactly(self._file, count * self._dtype.itemsize, self._path)
        self._at, self._left = self._at + len(data), self._left - count
        self._block = iter(np.frombuffer(data, self._dtype).tolist())
        return next(self._block)


def _take(data: BinaryIO, size: int, dtype: np.dtype, path: Path) -> _Found:
    if size > base.LARGEST:
        data.seek(size, 1)
        return _Found(None, None, size)
    return _Found(np.frombuffer(_exactly(data, size, path), dtype), None, size)


def _exactly(file: BinaryIO, size: int, path: Path) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _damaged(f"{path.name} breaks off")
    return data


def _damaged(why: str) -> UnreadableError:
    return UnreadableError("damaged", f"damaged ({why})")


class _Format(NamedTuple):
    """How files of a suffix are read, why one is none, and which others belong to one."""

    read: Callable[[SourceFile, int], Iterator[_Found]]
    is_none: Callable[[Path], str] = lambda path: ""
    needs: tuple[Callable[[Path], Path], ...] = ()
    may_have: tuple[Callable[[Path], Path], ...] = ()


def _beside(suffix: str) -> Callable[[Path], Path]:
    return lambda path: path.with_name(path.name + suffix)


_FORMATS = {
    ".bin": _Format(_megatron, _is_no_index, needs=(lambda path: path.with_suffix(".idx"),)),
    ".ds": _Format(
        _datatrove,
        needs=(_beside(".index"),),
        may_have=(_beside(".loss"), _beside(".metadata")),
    ),
    ".npy": _Format(_numpy, _is_no_row),
}
TOKENS = tuple(_FORMATS)
"""Suffixes, in lower case."""
_PARTS: dict[str, Callable[[Path], Path]] = {
    ".idx": lambda path: path.with_suffix(".bin"),
    **dict.fromkeys((".index", ".loss", ".metadata"), lambda path: path.with_suffix("")),
}


def parts_of(path: Path) -> list[Path] | None:
    """The files that belong to one of tokens, itself the first; None: one that it needs is missing.

    Of a file of another kind: itself.
    """
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        return [path]
    needed = [part(path) for part in form.needs]
    if not all(part.is_file() for part in needed):
        return None
    return [path, *needed, *(p for part in form.may_have if (p := part(path)).is_file())]


def part_of(path: Path) -> Path | None:
    """The file of tokens that this one belongs to; None: to none."""
    whole = _PARTS.get(path.suffix.lower())
    if whole is None or not whole(path).is_file():
        return None
    found = whole(path)
    return found if path in (parts_of(found) or ()) and found != path else None

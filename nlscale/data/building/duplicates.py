"""Documents that came before: exactly the same text, with the same mask, in the order of sources.

Of tokens that are no whole characters, or stand for no text, the ids have to be the same.

The survey of a unit writes 24 bytes a document, sorted by hash in runs of a million. A range of
hashes is read from all runs, so that as many ranges as it takes keep the memory small: each finds
its own duplicates, and they are noted by unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nlscale.data.building.work import DUPLICATES, SURVEY, Making, Work
from nlscale.data.documents import Document
from nlscale.data.progress import Advance

_RECORD = np.dtype([("key", "<u8"), ("rest", "<u8"), ("number", "<u4"), ("group", "<u4")])
_RUN = 1 << 20  # records
_RANGE = 1 << 22  # documents, about, of a range of hashes: some 200 MB while it is looked at
_HASHES, _NUMBERS = "hashes", "numbers"
SAME, EARLIER = "came before in the same source", "came before in an earlier source"
"""Where the first one lies; see `nlscale.data.sources.find_files` for what a source is."""


class Hashes:
    """Writes the hashes of a unit's documents. Raises OSError."""

    def __init__(self, making: Making) -> None:
        self._file = making.file(_HASHES)
        self._out = self._file.__enter__()
        self._digests = bytearray()
        self._numbers: list[int] = []
        self._groups: list[int] = []

    def add(self, document: Document, number: int, group: int) -> None:
        """The next document: its number in the unit, and its source."""
        digest = hashlib.blake2b(document.identity, digest_size=16)
        if document.spans is not None:  # no text holds 0xFF
            digest.update(b"\xff" + repr(document.spans).encode())
        if document.tokens is not None and document.tokens.counted is not None:
            digest.update(b"\xff" + document.tokens.counted.tobytes())
        self._digests += digest.digest()
        self._numbers.append(number)
        self._groups.append(group)
        if len(self._numbers) == _RUN:
            self._write()

    def close(self) -> None:
        """Write the last of them."""
        self._write()
        self._file.__exit__(None, None, None)

    def _write(self) -> None:
        run = np.empty(len(self._numbers), dtype=_RECORD)
        pairs = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        run["key"], run["rest"] = pairs[:, 0], pairs[:, 1]
        run["number"], run["group"] = self._numbers, self._groups
        self._out.write(run[np.argsort(run["key"], kind="stable")].tobytes())
        self._digests.clear()
        self._numbers.clear()
        self._groups.clear()


def ranges(documents: int) -> int:
    """In how many ranges of hashes duplicates are looked for among so many documents."""
    return -(-documents // _RANGE) or 1


def find_duplicates(work: Work, number: int, advance: Advance) -> tuple[int, int]:
    """Find those in a range of hashes, unless that has been done; hashed bytes done before, and 0.

    Raises OSError.
    """
    units = work.plan.units
    of = ranges(sum(work.made(SURVEY, unit.number)["documents"] for unit in units))
    first, end = ((number + i) * (1 << 64) // of for i in (0, 1))
    if (result := work.checked(DUPLICATES, number)) is not None:
        return result["read"], 0
    with work.making(DUPLICATES, number) as making:
        parts, owners, read = [np.empty(0, _RECORD)], [np.empty(0, np.uint32)], 0
        for unit in units:
            for part in _parts(work, unit.number, first, end):
                parts.append(part)
                owners.append(np.full(len(part), unit.number, dtype=np.uint32))
                read += part.nbytes
                advance(part.nbytes, 0)
        records, owner = np.concatenate(parts), np.concatenate(owners)
        order = np.lexsort((records["number"], owner, records["rest"], records["key"]))
        records, owner = records[order], owner[order]
        # Where each begins that has another hash than the one before.
        new = np.ones(len(records), dtype=np.bool_)
        new[1:] = (records["key"][1:] != records["key"][:-1]) | (
            records["rest"][1:] != records["rest"][:-1]
        )
        group = records["group"]
        begins = group[np.flatnonzero(new)[np.cumsum(new) - 1]]
        same = int((~new & (begins == group)).sum())
        numbers, owner = records["number"][~new], owner[~new]
        order = np.argsort(owner, kind="stable")
        with making.file(_NUMBERS) as out:
            out.write(numbers[order].astype("<u4").tobytes())
        starts = np.searchsorted(owner[order], np.arange(len(units) + 1))
        making.result |= {
            "read": read,
            "starts": starts.tolist(),
            "same": same,
            "earlier": len(numbers) - same,
        }
    return 0, 0


def _parts(work: Work, unit: int, first: int, end: int) -> Iterator[NDArray]:
    """Of each run of a unit, the records with a key from `first` on and below `end`."""
    path = work.path(SURVEY, unit) / _HASHES
    if not path.stat().st_size:
        return
    hashes = np.memmap(path, dtype=_RECORD, mode="r")
    for start in range(0, len(hashes), _RUN):
        run = hashes[start : start + _RUN]
        low, high = (_below(run, bound) for bound in (first, end))
        if high > low:
            yield np.array(run[low:high])


def _below(run: NDArray, bound: int) -> int:
    """How many records of a sorted run have a key below a bound; reads a few of them."""
    low, high = 0, len(run)
    while low < high:
        middle = (low + high) // 2
        if int(run[middle]["key"]) < bound:
            low = middle + 1
        else:
            high = middle
    return low


def dropped(work: Work, unit: int, documents: int, of: int) -> NDArray[np.bool_]:
    """Which documents of a unit are not written: bool [documents]. Raises OSError.

    Args:
        work: what is being built.
        unit: its number.
        documents: that it has.
        of: the ranges of hashes in which duplicates were looked for.
    """
    gone = np.zeros(documents, dtype=np.bool_)
    for number in range(of):
        first, end = work.made(DUPLICATES, number)["starts"][unit : unit + 2]
        path = work.path(DUPLICATES, number) / _NUMBERS
        gone[np.fromfile(path, dtype="<u4", count=end - first, offset=4 * first)] = True
    return gone


def reasons(work: Work, of: int) -> dict[str, int]:
    """How many are dropped, by where the first ones lie; of so many ranges. Raises OSError."""
    counts = {SAME: 0, EARLIER: 0}
    for number in range(of):
        result = work.made(DUPLICATES, number)
        counts[SAME] += result["same"]
        counts[EARLIER] += result["earlier"]
    return {reason: count for reason, count in counts.items() if count}

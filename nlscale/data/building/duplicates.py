"""Documents that came before: exactly the same text, with the same mask, in the order of sources.

The survey of a unit writes 28 bytes a document, sorted by hash in runs of a million. Of what a run
has of one source more than once it writes the first, how often it comes again, and elsewhere the
numbers of the others: however often a document is repeated, a range has few records of it. A range
of hashes is read from all runs, so that as many ranges as it takes keep the memory small: each
finds its own duplicates, and they are noted by unit.

Documents are compared by their text; of tokens that are no whole characters, or stand for no text,
the ids have to be the same. A mask that all of a text is in is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from nlscale.data.building.work import DUPLICATES, SURVEY, Making, Work
from nlscale.data.documents import Document
from nlscale.data.progress import Advance
from nlscale.data.spans import normalized

_RECORD = np.dtype(
    [("key", "<u8"), ("rest", "<u8"), ("number", "<u4"), ("group", "<u4"), ("again", "<u4")]
)
_RUN = 1 << 20  # records
_RANGE = 1 << 22  # documents, about, of a range of hashes: some 200 MB while it is looked at
_HASHES, _AGAIN, _SPLITS, _NUMBERS = "hashes", "again", "splits", "numbers"
SAME, EARLIER = "came before in the same source", "came before in an earlier source"
"""Where the first one lies; see `nlscale.data.sources.find_files` for what a source is."""


class Hashes:
    """Writes the hashes of a unit's documents. Raises OSError.

    Args:
        making: the folder of the unit.
        splits: whether to write what decides their split, too (`kept_splits`): 8 bytes a document
    """

    def __init__(self, making: Making, splits: bool) -> None:
        self._files, self._making = ExitStack(), making
        self._runs: list[int] = []
        self._out = self._files.enter_context(making.file(_HASHES))
        self._again = self._files.enter_context(making.file(_AGAIN))
        self._out_splits = self._files.enter_context(making.file(_SPLITS)) if splits else None
        self._digests = bytearray()
        self._numbers: list[int] = []
        self._groups: list[int] = []
        self._splits: list[int] = []

    def add(self, document: Document, number: int, group: int, split: int) -> None:
        """The next document: its number in the unit, its source, and what decides its split."""
        self._digests += _digest(document)
        self._numbers.append(number)
        self._groups.append(group)
        self._splits.append(split)
        if len(self._numbers) == _RUN:
            self._write()

    def close(self) -> None:
        """Write the last of them, and note the records of each run."""
        self._write()
        self._making.result["runs"] = self._runs
        self._files.close()

    def _write(self) -> None:
        run = np.empty(len(self._numbers), dtype=_RECORD)
        pairs = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        run["key"], run["rest"] = pairs[:, 0], pairs[:, 1]
        run["number"], run["group"] = self._numbers, self._groups
        run = run[np.lexsort((run["group"], run["rest"], run["key"]))]  # which keeps the order
        first = _differs(run, "key", "rest", "group")
        at = np.flatnonzero(first)
        run["again"][at] = np.diff(at, append=len(run)) - 1
        self._out.write(run[first].tobytes())
        self._runs.append(len(at))
        self._again.write(run["number"][~first].tobytes())
        if self._out_splits is not None:
            self._out_splits.write(np.array(self._splits, dtype="<u8").tobytes())
        self._splits.clear()
        self._digests.clear()
        self._numbers.clear()
        self._groups.clear()


def _digest(document: Document) -> bytes:
    """The same of documents that are duplicates, 16 bytes."""
    digest = hashlib.blake2b(document.identity, digest_size=16)
    spans = normalized(document.spans, len(document.text))
    if spans is not None:  # no text holds 0xFF
        digest.update(b"\xff" + repr(spans).encode())
    counted = None if document.tokens is None else document.tokens.counted
    if counted is not None and not counted.all():
        digest.update(b"\xff" + counted.tobytes())
    return digest.digest()


def _differs(records: NDArray, *fields: str) -> NDArray[np.bool_]:
    """Whether each has another value in some of the fields than the one before: bool [records]."""
    differs = np.ones(len(records), dtype=np.bool_)
    differs[1:] = False
    for field in fields:
        differs[1:] |= records[field][1:] != records[field][:-1]
    return differs


def hashed_bytes(work: Work) -> int:
    """Of all units, which the ranges read. Raises OSError."""
    made = (work.made(SURVEY, unit.number)["files"] for unit in work.plan.units)
    return sum(files[_HASHES][0] for files in made)


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
    surveyed = surveyed_hashes(work)
    result = work.checked(DUPLICATES, number)
    # A unit may have been surveyed anew, where what could not be read was there again.
    if result is not None and result["surveyed"] == surveyed:
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
        new = _differs(records, "key", "rest")
        group, again = records["group"], records["again"].astype(np.int64)
        begins = group[np.flatnonzero(new)[np.cumsum(new) - 1]]
        gone = again + ~new
        here = begins == group
        folders = np.array([unit.folder for unit in units])[owner]
        count = units[-1].folder + 1
        same, earlier = (_sums(folders[at], gone[at], count) for at in (here, ~here))
        numbers, owner = records["number"][~new], owner[~new]
        order = np.argsort(owner, kind="stable")
        with making.file(_NUMBERS) as out:
            out.write(numbers[order].astype("<u4").tobytes())
        starts = np.searchsorted(owner[order], np.arange(len(units) + 1))
        making.result |= {
            "read": read,
            "surveyed": surveyed,
            "starts": starts.tolist(),
            "same": same,
            "earlier": earlier,
        }
    return 0, 0


def _sums(folders: NDArray, counts: NDArray[np.int64], many: int) -> list[int]:
    """For each of so many folders the sum of `counts` [records] at `folders` [records]."""
    sums = np.zeros(many, dtype=np.int64)
    np.add.at(sums, folders, counts)
    return sums.tolist()


def surveyed_hashes(work: Work) -> str:
    """A sha256 of the hashes of all units, of which each range is a part. Raises OSError."""
    digest = hashlib.sha256()
    for unit in work.plan.units:
        size, sha256 = work.made(SURVEY, unit.number)["files"][_HASHES]
        digest.update(f"{size} {sha256}\n".encode())
    return digest.hexdigest()


def _parts(work: Work, unit: int, first: int, end: int) -> Iterator[NDArray]:
    """Of each run of a unit, the records with a key from `first` on and below `end`."""
    path = work.path(SURVEY, unit) / _HASHES
    if not path.stat().st_size:
        return
    hashes = np.memmap(path, dtype=_RECORD, mode="r")
    start = 0
    for count in work.made(SURVEY, unit)["runs"]:
        run = hashes[start : start + count]
        start += count
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


def starts_of(work: Work, of: int) -> NDArray[np.int64]:
    """Where in each of so many ranges the duplicates of each unit begin: int64 [of, units + 1].

    Raises OSError.
    """
    return np.array([work.made(DUPLICATES, number)["starts"] for number in range(of)])


def dropped(work: Work, unit: int, documents: int, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which documents of a unit are not written: bool [documents]. Raises OSError.

    Args:
        work: what is being built.
        unit: its number.
        documents: that it has.
        starts: see `starts_of`.
    """
    gone = np.zeros(documents, dtype=np.bool_)
    gone[np.fromfile(work.path(SURVEY, unit) / _AGAIN, dtype="<u4")] = True
    for number, (first, end) in enumerate(starts[:, unit : unit + 2].tolist()):
        path = work.path(DUPLICATES, number) / _NUMBERS
        gone[np.fromfile(path, dtype="<u4", count=end - first, offset=4 * first)] = True
    return gone


def kept_splits(work: Work, unit: int, starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What decides the splits of the documents of a unit that are written, uint64 [kept].

    Arguments are those of `dropped`. Raises OSError.
    """
    splits = np.fromfile(work.path(SURVEY, unit) / _SPLITS, dtype="<u8")
    return splits[~dropped(work, unit, len(splits), starts)]


def reasons(work: Work, folder: int, of: int) -> dict[str, int]:
    """How many a data folder lacks, by where the first ones lie; of so many ranges.

    Raises OSError.
    """
    counts = {SAME: 0, EARLIER: 0}
    for number in range(of):
        result = work.made(DUPLICATES, number)
        counts[SAME] += result["same"][folder]
        counts[EARLIER] += result["earlier"][folder]
    return {reason: count for reason, count in counts.items() if count}

"""The first pass over the text: what there is, and which documents are held out."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nlscale.data.building.duplicates import Hashes, kept_splits, starts_of
from nlscale.data.building.options import DROP
from nlscale.data.building.units import Plan, Unit, found_of, losses_of
from nlscale.data.building.work import SURVEY, Making, Work
from nlscale.data.documents import Document, SourceFile, UnreadableError, read_documents
from nlscale.data.losses import Losses
from nlscale.data.progress import Advance
from nlscale.data.tally import shown
from nlscale.errors import UserError

_BPE_DOCUMENT_CHARACTERS = 1 << 20  # so that no single document is the sample
_SHARES = 4
"""Times its share of the bytes that a unit may give of the sample: what the sample of a large
corpus takes on the disk does not grow with it."""
_LEAST_SAMPLE = 64 << 10  # characters of a unit
_DIGEST = 16  # bytes
_CONTENTS, _SAMPLE = "contents", "sample.jsonl"


class Key(NamedTuple):
    """What the hash of a document decides: its split, and its place in the BPE's sample."""

    split: int  # uniform in [0, 2**64), as is the other
    sample: int


def key_of(document: Document, seed: int) -> Key:
    """Of the text of a document, or of its ids where they stand for none."""
    data = document.data or document.identity
    salt = (seed % (1 << 64)).to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=16, salt=salt).digest()
    return Key(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


class Content:
    """What both passes must find alike in a file."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_DIGEST)

    def add(self, key: Key, document: Document) -> None:
        """Take note of the next document."""
        self._hash.update(key.split.to_bytes(8, "little") + repr(document.spans).encode())
        if document.tokens is not None:  # of which others could stand for the same text
            ids, counted = document.tokens
            self._hash.update(ids.tobytes() + (b"" if counted is None else counted.tobytes()))

    def digest(self) -> bytes:
        """Of all of them."""
        return self._hash.digest()


class Sample:
    """The documents with the smallest sample keys, of as many characters as are wanted.

    Args:
        characters: the most, but for the last document.
        distinct: whether a text counts once.
    """

    def __init__(self, characters: int, distinct: bool) -> None:
        self._most, self._distinct = characters, distinct
        # The largest sample key on top: (-sample key, number, split key, text).
        self._heap: list[tuple[int, tuple[int, int], int, str]] = []
        self._size = 0
        self._there: set[tuple[int, int]] = set()

    def add(self, key: Key, number: tuple[int, int], text: str) -> None:
        """The next document, which has that number: of its unit, and in it."""
        if self._full() and key.sample > -self._heap[0][0]:
            return
        if self._distinct:
            if key in self._there:
                return
            self._there.add(key)
        heapq.heappush(self._heap, (-key.sample, number, key.split, text))
        self._size += len(text)
        while self._size - len(self._heap[0][3]) >= self._most:
            sample, _, split, removed = heapq.heappop(self._heap)
            self._size -= len(removed)
            self._there.discard((split, -sample))

    def _full(self) -> bool:
        return self._size >= self._most

    def texts(self) -> list[tuple[tuple[int, int], Key, str]]:
        """Number, key and text, by number."""
        return sorted((n, Key(split, -sample), text) for sample, n, split, text in self._heap)


def survey_unit(work: Work, number: int, advance: Advance) -> tuple[int, int]:
    """Survey a unit, unless that has been done; source bytes and documents that were done before.

    Args:
        work: what is being built.
        number: of the unit.
        advance: is told how many bytes of the files each document took.

    Raises:
        OSError: the disk does.
    """
    unit = work.plan.units[number]
    result = work.checked(SURVEY, number)
    # What could not be read may be there again.
    if result is not None and not result["lost_files"]:
        return unit.bytes, result["documents"]
    with work.making(SURVEY, number) as making:
        seen = _Seen(work, unit, making)
        for file in work.files(unit):
            seen.read(file, advance)
        seen.close()
    return 0, 0


class _Seen:
    """What was seen of a unit so far."""

    def __init__(self, work: Work, unit: Unit, making: Making) -> None:
        plan, options = work.plan, work.plan.options
        self._text_field, self._seed, self._unit = options.text_field, options.seed, unit
        self._tokenizer = work.given()
        self._losses = Losses.of_a_part(found_of(plan, unit.folder), options.text_field)
        self._making = making
        self._documents = self._bytes = self._empty = 0
        self._masked = False
        self._lowest, self._highest = 1 << 64, -1
        self._contents = bytearray()
        self._cut_off: list[int] = []
        self._files = 0
        drops = options.duplicates == DROP
        self._hashes = Hashes(making, _drops_across(plan)) if drops else None
        self._sample = Sample(_share(plan, unit), drops) if options.trains is not None else None

    def read(self, file: SourceFile, advance: Advance) -> None:
        """Take note of what is in a file and of what is lost."""
        content = Content()
        try:
            for document in read_documents(file, self._text_field, self._tokenizer):
                self._add(file, document, content)
                advance(document.consumed)
        except UnreadableError as error:
            self._losses.end(file, error.kind, str(error))
            self._cut_off.append(self._files)
        else:
            self._losses.end(file)
        self._contents += content.digest()
        self._files += 1

    def _add(self, file: SourceFile, document: Document, content: Content) -> None:
        if document.error:
            self._losses.lose(document)
            return
        self._losses.keep(len(document.data))
        if document.empty:
            self._empty += 1
            return
        key = key_of(document, self._seed)
        if self._hashes is not None:
            # Of one folder the groups are the sources; of several each is a source, of group 0.
            group = self._unit.folder + file.group
            self._hashes.add(document, self._documents, group, key.split)
        self._documents += 1
        self._bytes += len(document.data)
        self._masked |= document.masked
        content.add(key, document)
        self._lowest = min(self._lowest, key.split)
        self._highest = max(self._highest, key.split)
        if self._sample is not None:
            text = document.text[:_BPE_DOCUMENT_CHARACTERS]
            self._sample.add(key, (self._unit.number, self._documents), text)

    def close(self) -> None:
        """Write what was seen. Raises OSError."""
        with self._making.file(_CONTENTS) as out:
            out.write(bytes(self._contents))
        if self._hashes is not None:
            self._hashes.close()
        if self._sample is not None:
            with self._making.file(_SAMPLE) as out:
                for (_, number), key, text in self._sample.texts():
                    out.write(json.dumps([number, *key, text]).encode() + b"\n")
        self._making.result |= {
            "documents": self._documents,
            "bytes": self._bytes,
            "empty": self._empty,
            "masked": self._masked,
            "lowest": self._lowest,
            "highest": self._highest,
            "losses": self._losses.plain(),
            "lost_files": self._losses.any_file(),
            "cut_off": self._cut_off,
        }


def _share(plan: Plan, unit: Unit) -> int:
    """Characters of the sample that a unit may give."""
    most = plan.options.bpe_sample
    share = _SHARES * most * unit.bytes // max(1, plan.bytes)
    return min(most, max(_LEAST_SAMPLE, share))


def _drops_across(plan: Plan) -> bool:
    """Whether a document may be left out of a data folder for one in another."""
    return plan.options.duplicates == DROP and len(plan.folders) > 1


def contents_of(work: Work, number: int) -> Iterator[bytes]:
    """What the files of a surveyed unit contained, see `Content.digest`. Raises OSError."""
    contents = (work.path(SURVEY, number) / _CONTENTS).read_bytes()
    for i in range(0, len(contents), _DIGEST):
        yield contents[i : i + _DIGEST]


class Survey:
    """What all units of a data folder have together, when each was surveyed.

    Fields: `documents`, `bytes` (UTF-8), `empty`, `masked` (whether some document has a mask),
    `losses`, and after `settle`, `threshold`: a document below it is held out.

    Raises:
        UserError: a unit has not been surveyed.
        OSError: the disk does.
    """

    def __init__(self, work: Work, folder: int) -> None:
        plan = work.plan
        self._work, self._units = work, plan.units_of(folder)
        self._name = plan.folders[folder]["name"]
        self.losses = losses_of(plan, folder)
        self.documents = self.bytes = self.empty = 0
        self.masked = False
        self.threshold = 0
        self._lowest, self._highest = 1 << 64, -1
        for unit in self._units:
            of_unit = work.made(SURVEY, unit.number)
            self.documents += of_unit["documents"]
            self.bytes += of_unit["bytes"]
            self.empty += of_unit["empty"]
            self.masked |= of_unit["masked"]
            self._lowest = min(self._lowest, of_unit["lowest"])
            self._highest = max(self._highest, of_unit["highest"])
            self.losses.merge(of_unit["losses"])

    def settle(self) -> None:
        """Fix the split, so that neither side is empty.

        Raises:
            UserError: there are no documents, or only copies of one.
        """
        hold = f"the files of {shown(self._name)} hold" if self._name else "the sources hold"
        if not self.documents:
            raise UserError(f"{hold} no documents but {self.empty:,} empty ones; name others")
        if self._lowest == self._highest:
            raise UserError(
                f"{hold} only one distinct document ({self.documents} in all), but "
                "training and validation need one each; add more text or split the file"
            )
        self._fix()

    def settle_without(self, ranges: int) -> None:
        """As `settle`, of what is left when duplicates have been found in so many ranges.

        Raises:
            UserError: there are no documents left for both splits.
            OSError: the disk does.
        """
        if not _drops_across(self._work.plan):
            return  # of each text one is left, and with it the split is what it was
        self._lowest, self._highest, left = 1 << 64, -1, 0
        starts = starts_of(self._work, ranges)
        for unit in self._units:
            splits = kept_splits(self._work, unit.number, starts)
            left += len(splits)
            if len(splits):
                self._lowest = min(self._lowest, int(splits.min()))
                self._highest = max(self._highest, int(splits.max()))
        if self._lowest >= self._highest:
            raise UserError(
                f"of the {self.documents:,} documents of {shown(self._name)} {left:,} are left "
                "when duplicates are dropped, but training and validation need one each; name it "
                "before the sources that hold the same text, leave it out, or use "
                "--duplicates keep"
            )
        self._fix()

    def _fix(self) -> None:
        self.threshold = int(self._work.plan.options.held_out * (1 << 64))
        if self._lowest >= self.threshold:
            self.threshold = self._lowest + 1
        elif self._highest < self.threshold:
            self.threshold = self._highest


def sample_of(work: Work, surveys: Sequence[Survey]) -> list[str]:
    """The text to train a BPE on, of train documents only, in their order.

    Args:
        work: what is being built.
        surveys: of all data folders by number, settled.

    Raises:
        OSError: the disk does.
    """
    options = work.plan.options
    sample = Sample(options.bpe_sample, options.duplicates == DROP)
    for unit in work.plan.units:
        with open(work.path(SURVEY, unit.number) / _SAMPLE, encoding="utf-8") as lines:
            for line in lines:
                number, split, place, text = json.loads(line)
                sample.add(Key(split, place), (unit.number, number), text)
    thresholds = [surveys[unit.folder].threshold for unit in work.plan.units]
    return [text for (n, _), key, text in sample.texts() if key.split >= thresholds[n]]

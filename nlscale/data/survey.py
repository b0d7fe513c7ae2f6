"""The first pass over the text: what there is, and which documents are held out."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from nlscale.data.documents import Document, UnreadableError, read_documents
from nlscale.data.losses import Losses
from nlscale.data.sources import Found
from nlscale.errors import UserError

_BPE_SAMPLE_CHARACTERS = 64 << 20
_BPE_DOCUMENT_CHARACTERS = 1 << 20  # so that no single document is the sample


class _Key(NamedTuple):
    """What the hash of a document decides: its split, and its place in the BPE's sample."""

    split: int  # uniform in [0, 2**64), as is the other
    sample: int


def _key(data: bytes, seed: int) -> _Key:
    salt = (seed % (1 << 64)).to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=16, salt=salt).digest()
    return _Key(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


def _seen(key: _Key, document: Document) -> bytes:
    """What both passes must find alike in a document."""
    return key.split.to_bytes(8, "little") + repr(document.spans).encode()


class Survey:
    """Counts, the threshold of the split, and the text to train a BPE on.

    Attributes:
        found: the files that are surveyed
        text_field: what the text of a record is called
        held_out: share of the documents for validation
        seed: of the hash
        sample: whether to gather text to train a BPE on

    Fields: `documents`, `bytes` (UTF-8), `empty`, `losses`, `masked` (whether some document has a
    mask), and after `settle`, `sample`.
    """

    def __init__(
        self, found: Found, text_field: str, held_out: float, seed: int, sample: bool
    ) -> None:
        self.documents = 0
        self.bytes = 0
        self.empty = 0
        self.masked = False
        self.losses = Losses(found, text_field)
        self.sample: list[str] = []
        self._files = found.files
        self._text_field = text_field
        self._seed = seed
        self._threshold = int(held_out * (1 << 64))
        self._lowest, self._highest = 1 << 64, -1
        self._content = hashlib.sha256()
        self._want_sample = sample
        # The documents with the smallest sample keys, the largest of them on top:
        # (-sample key, number, split key, text).
        self._heap: list[tuple[int, int, int, str]] = []
        self._heap_size = 0

    def read(self, advance: Callable[[int], None]) -> None:
        """Read all files, and take note of what is in them and of what is lost.

        Args:
            advance: is told how many bytes of the files each document took
        """
        for file in self._files:
            try:
                for document in read_documents(file, self._text_field):
                    self._add(document)
                    advance(document.consumed)
            except UnreadableError as error:
                self.losses.end(file, error.kind, str(error))
            else:
                self.losses.end(file)

    def _add(self, document: Document) -> None:
        if document.error:
            self.losses.lose(document)
            return
        self.losses.keep()
        if not document.data:
            self.empty += 1
            return
        key = _key(document.data, self._seed)
        self.documents += 1
        self.bytes += len(document.data)
        self.masked |= document.spans is not None
        self._content.update(_seen(key, document))
        self._lowest = min(self._lowest, key.split)
        self._highest = max(self._highest, key.split)
        if self._want_sample:
            text = document.text[:_BPE_DOCUMENT_CHARACTERS]
            heapq.heappush(self._heap, (-key.sample, self.documents, key.split, text))
            self._heap_size += len(text)
            while self._heap_size - len(self._heap[0][3]) >= _BPE_SAMPLE_CHARACTERS:
                self._heap_size -= len(heapq.heappop(self._heap)[3])

    def settle(self) -> None:
        """Fix the split, so that neither side is empty, and the sample (train documents only).

        Raises:
            UserError: there are no documents, or only copies of one.
        """
        if not self.documents:
            raise UserError(
                f"the sources hold no documents but {self.empty:,} empty ones; name others"
            )
        if self._lowest == self._highest:
            raise UserError(
                f"the sources hold only one distinct document ({self.documents} in all), but "
                "training and validation need one each; add more text or split the file"
            )
        if self._lowest >= self._threshold:
            self._threshold = self._lowest + 1
        elif self._highest < self._threshold:
            self._threshold = self._highest
        kept = sorted((n, text) for _, n, split, text in self._heap if split >= self._threshold)
        self.sample = [text for _, text in kept]
        self._heap.clear()

    def split(self, data: bytes) -> str:
        """Where the document with these UTF-8 bytes belongs: "train" or "validation"."""
        held_out = _key(data, self._seed).split < self._threshold
        return "validation" if held_out else "train"

    def again(self) -> Iterator[Document]:
        """The readable documents a second time; at the end, UserError if they have changed."""
        content = hashlib.sha256()
        for file in self._files:
            with suppress(UnreadableError):  # which ends the file where it ended it before
                for document in read_documents(file, self._text_field):
                    if document.data:
                        content.update(_seen(_key(document.data, self._seed), document))
                        yield document
        if content.digest() != self._content.digest():
            raise UserError("the sources changed while they were being read; build again")

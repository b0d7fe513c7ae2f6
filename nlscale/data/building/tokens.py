"""The second pass over the text: a unit becomes shards of its own."""

from __future__ import annotations

import hashlib
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlscale.data.building.duplicates import dropped, starts_of
from nlscale.data.building.settle import settled_of
from nlscale.data.building.survey import Content, contents_of, key_of
from nlscale.data.building.work import SURVEY, TOKENS, Changed, Making, Result, Work
from nlscale.data.documents import SourceFile, UnreadableError, read_documents
from nlscale.data.index import SPLITS
from nlscale.data.progress import Advance
from nlscale.data.tokenizer import Tokenizer, load_tokenizer
from nlscale.errors import UserError

_COUNTS = "counts"


def write_unit(work: Work, number: int, advance: Advance) -> tuple[int, int]:
    """Write a unit's shards, unless that has been done; bytes of text and documents done before.

    Args:
        work: what is being built, after it has been settled.
        number: of the unit.
        advance: is told how many bytes of text each document has.

    Raises:
        Changed: a file has another content than when it was surveyed.
        UserError: a file cannot be read any more.
        OSError: the disk does.
    """
    surveyed, settled = work.made(SURVEY, number), settled_of(work)
    if settled is None:
        raise UserError(f"{work.out} is not settled; give the same command again")
    made_of = json.dumps([settled, surveyed["files"]], sort_keys=True)
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    result = work.checked(TOKENS, number)
    if result is not None and result["made_of"] == digest:
        return surveyed["bytes"], surveyed["documents"]
    with work.making(TOKENS, number) as making:
        making.result["made_of"] = digest
        _Unit(work, number, making, settled, advance).write(surveyed)
    return 0, 0


class _Unit:
    def __init__(
        self,
        work: Work,
        number: int,
        making: Making,
        settled: dict[str, Any],
        advance: Advance,
    ) -> None:
        # Here, not at the top: it imports torch, and finding the data up to date should be quick.
        from nlscale.data.writer import DataWriter

        plan = work.plan
        self._work, self._making, self._advance = work, making, advance
        self._unit, self._options = plan.units[number], plan.options
        self._settled, self._ranges = settled["folders"][self._unit.folder], settled["ranges"]
        # Keys are to be unique in the folder; a corpus of one unit has those that it always had.
        beside = plan.units_of(self._unit.folder)
        prefix = f"{number - beside[0].number:05d}-" if len(beside) > 1 else ""
        tokenizer = _tokenizer(work.folders[0], settled["tokenizer"])
        # The saved one is the given one; a trained one, and bytes, have made no sources.
        self._given = tokenizer if self._options.given else None
        self._writer = DataWriter(
            making.folder,
            tokenizer,
            self._options.shard_blocks,
            self._options.block_tokens,
            self._settled["masked"],
            prefix,
            self._options.pack,
        )
        self._dropped: NDArray[np.bool_] | None = None
        self._dropped_bytes = 0
        self._seen = 0

    def write(self, surveyed: Result) -> None:
        documents = surveyed["documents"]
        if self._ranges:
            starts = starts_of(self._work, self._ranges)
            self._dropped = dropped(self._work, self._unit.number, documents, starts)
        contents = contents_of(self._work, self._unit.number)
        cut_off = set(surveyed["cut_off"])
        files = zip(self._work.files(self._unit), contents, strict=True)
        for position, (file, content) in enumerate(files):
            self._file(file, content, documents, position in cut_off)
        self._writer.close()
        splits = self._writer.splits()
        for split in splits.values():
            for shard in split["shards"]:
                self._making.vouch(shard["name"], shard["size_bytes"], shard["sha256"])
        with self._making.file(_COUNTS) as out:
            counts = np.stack([self._writer.counts()[split] for split in SPLITS])
            out.write(zlib.compress(counts.astype("<i8").tobytes(), 1))
        self._making.result |= {
            "format": self._writer.format,
            "splits": splits,
            "packed": self._writer.packed(),
            "sources": self._writer.sources(),
            "dropped_bytes": self._dropped_bytes,
        }

    def _file(self, file: SourceFile, expected: bytes, documents: int, cut_off: bool) -> None:
        content, threshold = Content(), self._settled["threshold"]
        try:
            for document in read_documents(file, self._options.text_field, self._given):
                if document.empty:
                    continue
                key = key_of(document, self._options.seed)
                content.add(key, document)
                if self._seen == documents:
                    raise self._changed(file)
                if self._dropped is not None and self._dropped[self._seen]:
                    self._dropped_bytes += len(document.data)
                else:
                    split = "validation" if key.split < threshold else "train"
                    if document.masked and not self._settled["masked"]:
                        raise self._changed(file)
                    text, data, tokens = document.text, document.data, document.tokens
                    self._writer.add(text, data, split, document.spans, tokens, file.group)
                self._seen += 1
                self._advance(len(document.data))
        except UnreadableError as error:
            if not cut_off:  # else it is to end where it ended before
                raise UserError(
                    f"{file.path} could be read when it was surveyed, and now it cannot: {error}; "
                    "see to it, and the same command goes on from what is finished"
                ) from None
        if content.digest() != expected:
            raise self._changed(file)

    def _changed(self, file: SourceFile) -> Changed:
        return Changed(
            f"the sources changed while they were being read: {file.path}; build again",
            self._unit.number,
        )


@lru_cache(1)
def _tokenizer(out: Path, sha256: str) -> Tokenizer:
    """That of the folder, whose file has that sha256: loaded once for many units."""
    return load_tokenizer(out)


def counts_of(work: Work, number: int, vocabulary: int) -> dict[str, NDArray[np.int64]]:
    """How often each id counts in a unit, by split: int64 [vocabulary]. Raises OSError."""
    data = zlib.decompress((work.path(TOKENS, number) / _COUNTS).read_bytes())
    return dict(zip(SPLITS, np.frombuffer(data, "<i8").reshape(-1, vocabulary), strict=True))

"""Writing tokens into webdataset tar shards.

Importing this module imports webdataset, and with it torch, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from nlscale.data.formats.base import Tokens
from nlscale.data.hashed import HashedFile
from nlscale.data.index import FORMAT, MASKED_FORMAT, SPLITS, TAR_RECORD, Shard, Split
from nlscale.data.packing import Packer
from nlscale.data.spans import Spans
from nlscale.data.tokenizer import Tokenizer

MEMBER, MASK_MEMBER = "tokens.bin", "mask.bin"
_BATCH_BYTES = 4 << 20  # enough documents to keep a BPE busy on all cores


class SplitWriter:
    """Concatenates token ids and cuts them into blocks, one tar member a block.

    Shards are `{split}-000000.tar` and so on, members `{block:09d}.tokens.bin`, numbered over
    the whole split, after `prefix`. The bytes depend on nothing but the tokens and the arguments.
    With masks each is preceded by `{block:09d}.mask.bin`: a bit a token, an eighth of what a byte
    would take, and always of a whole block, so that ids begin at the same place in each.

    Args:
        block_tokens: ids in a block
        shard_blocks: blocks in a shard
        dtype: of the ids on disk, little-endian
        vocabulary: ids are below it
        masked: whether there are masks
        prefix: before the number of a block, where other folders' shards are to stand beside these

    Fields, final after `close`: `shards`, `tokens`, and `counts` (int64 [vocabulary], how often
    each id was written and counts). Raises OSError when the disk does.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        block_tokens: int,
        shard_blocks: int,
        dtype: np.dtype,
        vocabulary: int,
        masked: bool = False,
        prefix: str = "",
    ) -> None:
        self.shards: list[Shard] = []
        self.tokens = 0
        self.counts = np.zeros(vocabulary, dtype=np.int64)
        self._directory = directory
        self._split = split
        self._shard_blocks = shard_blocks
        self._block = np.empty(block_tokens, dtype=dtype)
        self._masked, self._prefix = masked, prefix
        self._mask = np.ones(block_tokens, dtype=np.bool_)
        self._filled = 0
        self._blocks = 0
        self._file: HashedFile | None = None

    def write(self, ids: NDArray, mask: NDArray[np.bool_] | None = None) -> None:
        """Append `ids` (any integer dtype, [count]); `mask` [count]: which count, None: all."""
        done = 0
        while done < len(ids):
            here = min(len(ids) - done, len(self._block) - self._filled)
            end = self._filled + here
            self._block[self._filled : end] = ids[done : done + here]
            self._mask[self._filled : end] = True if mask is None else mask[done : done + here]
            self._filled, done = end, done + here
            if self._filled == len(self._block):
                self._write_block()

    def close(self) -> None:
        """Write the last, shorter block and finish the last shard."""
        if self._filled:
            self._write_block()
        self._close_shard()

    def _write_block(self) -> None:
        if self._file is None:
            name = f"{self._split}-{len(self.shards):06d}.tar"
            self._file = HashedFile(self._directory / name)
            # Time, user and group are fixed so that the same tokens give the same sha256.
            self._tar = webdataset.TarWriter(
                self._file, encoder=False, mtime=0, user="nlscale", group="nlscale"
            )
            self.shards.append(self._begin(name))
        ids, counted = self._block[: self._filled], self._mask[: self._filled]
        members = {"__key__": f"{self._prefix}{self._blocks:09d}", MEMBER: ids.tobytes()}
        if self._masked:  # webdataset writes members in the order of their names
            self._mask[self._filled :] = False
            members[MASK_MEMBER] = np.packbits(self._mask, bitorder="little").tobytes()
        self._tar.write(members)
        self.counts += np.bincount(ids[counted], minlength=len(self.counts))
        self.tokens += len(ids)
        shard = self.shards[-1]
        shard["tokens"] += len(ids)
        shard["blocks"] += 1
        self._blocks += 1
        self._filled = 0
        if shard["blocks"] == self._shard_blocks:
            self._close_shard()

    def _begin(self, name: str) -> Shard:
        """A shard in which nothing is written yet."""
        ids = TAR_RECORD + _padded(self._block.nbytes)
        mask = TAR_RECORD + _padded(-(-len(self._block) // 8)) if self._masked else 0
        shard = Shard(
            name=name,
            tokens=0,
            blocks=0,
            size_bytes=0,
            sha256="",
            offset=mask + TAR_RECORD,
            stride=mask + ids,
        )
        if self._masked:
            shard["mask_offset"] = TAR_RECORD
        return shard

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self.shards[-1]["size_bytes"] = self._file.size
        self.shards[-1]["sha256"] = self._file.sha256.hexdigest()
        self._file = None


class _Waiting(NamedTuple):
    """A document that is to be tokenized with others."""

    split: str
    text: str
    size: int
    spans: Spans | None
    tokens: Tokens | None
    source: int


class DataWriter:
    """Tokenizes documents and writes both splits of a data folder.

    Args:
        out: the folder
        encoder: the tokenizer
        shard_blocks, block_tokens: see `SplitWriter`
        masked: whether some tokens may not count as targets
        prefix: see `SplitWriter`
        pack: tokens of the samples into which documents are packed (`nlscale.data.packing`), which
            makes masks; None: they follow one another

    Fields: `format`, of the index.

    Raises:
        OSError: the disk does.
    """

    def __init__(
        self,
        out: Path,
        encoder: Tokenizer,
        shard_blocks: int,
        block_tokens: int,
        masked: bool = False,
        prefix: str = "",
        pack: int | None = None,
    ) -> None:
        masked = masked or pack is not None
        self.format = MASKED_FORMAT if masked else FORMAT
        self._encoder, self._masked = encoder, masked
        self._lengths = encoder.byte_lengths()
        self._separator = np.array([encoder.separator], dtype=encoder.dtype)
        self._writers = {
            split: SplitWriter(
                out,
                split,
                block_tokens,
                shard_blocks,
                encoder.dtype,
                encoder.vocabulary,
                masked,
                prefix,
            )
            for split in SPLITS
        }
        self._packers: dict[str, Packer] = {}
        if pack is not None:
            self._packers = {split: Packer(pack, encoder.separator) for split in SPLITS}
        self._documents = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._counted = dict.fromkeys(SPLITS, 0)
        self._sources: dict[str, dict[int, NDArray[np.int64]]] = {split: {} for split in SPLITS}
        self._batch: list[_Waiting] = []
        self._batch_bytes = 0

    def add(
        self,
        text: str,
        data: bytes,
        split: str,
        spans: Spans | None = None,
        tokens: Tokens | None = None,
        source: int = 0,
    ) -> None:
        """Append a document, given as str and as UTF-8, to `split`, and a separator.

        `spans` are what counts of its text; None: all of it. `tokens` are what it was made of;
        None: the tokenizer makes them. `source` is the number of the source that it came from.

        Raises:
            ValueError: there are spans, and the folder is one without masks.
        """
        masked = spans is not None or (tokens is not None and tokens.counted is not None)
        if masked and not self._masked:
            raise ValueError("a document has a mask, and the folder is written without masks")
        self._documents[split] += 1
        self._bytes[split] += len(data)
        self._batch.append(_Waiting(split, text, len(data), spans, tokens, source))
        self._batch_bytes += len(data) + (0 if tokens is None else tokens.ids.nbytes)
        if self._batch_bytes >= _BATCH_BYTES:
            self._flush()

    def add_tokens(self, ids: NDArray, mask: NDArray[np.bool_], split: str) -> None:
        """Append a document that is tokens already to `split`; no separator is added.

        Args:
            ids: any integer dtype, [count].
            mask: [count], whether token i counts as a target.
            split: "train" or "validation".

        Raises:
            ValueError: shapes differ, an id is outside the vocabulary, or a token does not count
                and the folder is one without masks.
        """
        if ids.ndim != 1 or mask.shape != ids.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"ids {ids.shape} and mask {mask.shape} {mask.dtype}: not [n], bool [n]"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._encoder.vocabulary:
            raise ValueError(
                f"ids run from {ids.min()} to {ids.max()}, "
                f"the vocabulary has {self._encoder.vocabulary}"
            )
        if not self._masked and not mask.all():
            raise ValueError("a token does not count, and the folder is written without masks")
        self._flush()  # documents stay in their order
        self._documents[split] += 1
        self._bytes[split] += int(self._lengths[ids].sum())
        self._write(split, ids, mask, self._lengths[ids])

    def close(self) -> None:
        """Finish all shards; the figures below are final after it."""
        self._flush()
        for split, packer in self._packers.items():
            for sample in packer.close():
                self._writers[split].write(*sample)
        for writer in self._writers.values():
            writer.close()

    def splits(self) -> dict[str, Split]:
        """The `splits` of the index."""
        splits = {}
        for name, writer in self._writers.items():
            splits[name] = Split(
                documents=self._documents[name],
                tokens=writer.tokens,
                bytes=self._bytes[name],
                shards=writer.shards,
            )
            if self._masked:
                splits[name]["counted_tokens"] = int(writer.counts.sum())
                splits[name]["counted_bytes"] = self._counted_bytes(name)
        return splits

    def sources(self) -> dict[str, list[list[int]]]:
        """What `add` took by split and source: number, documents, tokens, bytes of each."""
        return {
            split: [[number, *counts.tolist()] for number, counts in sorted(of_split.items())]
            for split, of_split in self._sources.items()
        }

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """How often each id was written and counts, by split: int64 [vocabulary]."""
        return {split: writer.counts for split, writer in self._writers.items()}

    def packed(self) -> dict[str, dict[str, int]]:
        """By split, documents that were cut, or have no separator, and tokens that fill up."""
        packers = self._packers.items()
        return {
            "cut": {split: packer.cut for split, packer in packers},
            "unended": {split: packer.unended for split, packer in packers},
            "padding": {split: packer.padding for split, packer in packers},
        }

    def unigram_bits_per_byte(self) -> float | None:
        """See `nlscale.data.index.Index`."""
        size = counted_bytes(self.splits()["validation"])
        return unigram_bits_per_byte(self.counts(), size)

    def _counted_bytes(self, split: str) -> int:
        """Bytes of text that the tokens which count stand for, where there are masks."""
        packer = self._packers.get(split)
        return self._counted[split] if packer is None else packer.counted_bytes

    def _flush(self) -> None:
        if not self._batch:
            return
        texts = [document.text for document in self._batch if document.tokens is None]
        encoded = iter(self._encoder.encode_batch(texts))
        for split, text, size, spans, tokens, source in self._batch:
            ids, mask = tokens if tokens is not None else (next(encoded), None)
            if spans is not None:
                mask = self._encoder.counted(text, spans, ids)
            sizes = None
            if self._masked:
                sizes = np.append(self._encoder.sizes(text, ids), 0)  # the separator is no text
            written = self._write(split, np.append(ids, self._separator), mask, sizes)
            counts = self._sources[split].setdefault(source, np.zeros(3, dtype=np.int64))
            counts += (1, written, size)
        self._batch.clear()
        self._batch_bytes = 0

    def _write(
        self,
        split: str,
        ids: NDArray,
        mask: NDArray[np.bool_] | None,
        sizes: NDArray[np.int64] | None,
    ) -> int:
        """Write tokens of a document and, where there are masks, the bytes that each stands for.

        Returns:
            How many are written; what fills a sample up is no part of a document.
        """
        if not self._packers:
            if sizes is not None:
                self._counted[split] += int((sizes if mask is None else sizes[mask]).sum())
            self._writers[split].write(ids, mask)
            return len(ids)
        packer = self._packers[split]
        for sample in packer.add(ids.astype(self._encoder.dtype), mask, sizes):
            self._writers[split].write(*sample)
        return packer.taken(ids)


def _padded(size: int) -> int:
    """Bytes that data of this size take in a tar file."""
    return -(-size // TAR_RECORD) * TAR_RECORD


def counted_bytes(split: Split) -> int:
    """Bytes of text that the tokens which count stand for; of all, where there are no masks."""
    return split.get("counted_bytes", split["bytes"])


def unigram_bits_per_byte(counts: dict[str, NDArray[np.int64]], size: int) -> float | None:
    """See `nlscale.data.index.Index`; of counts by split, [vocabulary], and bytes of validation."""
    train, validation = (counts[split] for split in SPLITS)
    return unigram_bits(train, validation) / size if size else None


def unigram_bits(train: NDArray[np.int64], validation: NDArray[np.int64]) -> float:
    """Bits to code tokens counted in `validation` by the frequencies of `train`, add-one smoothed.

    Both are int64 [vocabulary]; -sum_t validation_t log2((train_t + 1) / sum_u (train_u + 1)).
    """
    smoothed = train.astype(np.float64) + 1.0
    return float(-(validation * np.log2(smoothed / smoothed.sum())).sum())

"""Writing tokens into webdataset tar shards.

Importing this module imports webdataset, and with it torch, which takes seconds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray

from nlscale.data.index import SPLITS, TAR_RECORD, Shard, Split
from nlscale.data.tokenizer import Tokenizer

MEMBER = "tokens.bin"
_BATCH_BYTES = 4 << 20  # enough documents to keep a BPE busy on all cores


class SplitWriter:
    """Concatenates token ids and cuts them into blocks, one tar member a block.

    Shards are `{split}-000000.tar` and so on, members `{block:09d}.tokens.bin`, numbered over
    the whole split. The bytes depend on nothing but the tokens and the arguments.

    Args:
        block_tokens: ids in a block
        shard_blocks: blocks in a shard
        dtype: of the ids on disk, little-endian
        vocabulary: ids are below it

    Fields, final after `close`: `shards`, `tokens`, and `counts` (int64 [vocabulary], how often
    each id was written). Raises OSError when the disk does.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        block_tokens: int,
        shard_blocks: int,
        dtype: np.dtype,
        vocabulary: int,
    ) -> None:
        self.shards: list[Shard] = []
        self.tokens = 0
        self.counts = np.zeros(vocabulary, dtype=np.int64)
        self._directory = directory
        self._split = split
        self._shard_blocks = shard_blocks
        self._block = np.empty(block_tokens, dtype=dtype)
        self._filled = 0
        self._blocks = 0
        self._file: _HashedFile | None = None

    def write(self, ids: NDArray) -> None:
        """Append `ids` (any integer dtype, [count])."""
        while len(ids):
            here = min(len(ids), len(self._block) - self._filled)
            self._block[self._filled : self._filled + here] = ids[:here]
            self._filled += here
            ids = ids[here:]
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
            self._file = _HashedFile(self._directory / name)
            # Time, user and group are fixed so that the same tokens give the same sha256.
            self._tar = webdataset.TarWriter(
                self._file, encoder=False, mtime=0, user="nlscale", group="nlscale"
            )
            payload = self._block.nbytes
            padded = -(-payload // TAR_RECORD) * TAR_RECORD
            self.shards.append(
                Shard(
                    name=name,
                    tokens=0,
                    blocks=0,
                    size_bytes=0,
                    sha256="",
                    offset=TAR_RECORD,
                    stride=TAR_RECORD + padded,
                )
            )
        ids = self._block[: self._filled]
        self._tar.write({"__key__": f"{self._blocks:09d}", MEMBER: ids.tobytes()})
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.tokens += len(ids)
        shard = self.shards[-1]
        shard["tokens"] += len(ids)
        shard["blocks"] += 1
        self._blocks += 1
        self._filled = 0
        if shard["blocks"] == self._shard_blocks:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self.shards[-1]["size_bytes"] = self._file.size
        self.shards[-1]["sha256"] = self._file.sha256.hexdigest()
        self._file = None


class DataWriter:
    """Tokenizes documents and writes both splits of a data folder.

    Args:
        out: the folder
        encoder: the tokenizer
        shard_blocks, block_tokens: see `SplitWriter`

    Raises:
        OSError: the disk does.
    """

    def __init__(self, out: Path, encoder: Tokenizer, shard_blocks: int, block_tokens: int) -> None:
        self._encoder = encoder
        self._separator = np.array([encoder.separator], dtype=encoder.dtype)
        self._writers = {
            split: SplitWriter(
                out, split, block_tokens, shard_blocks, encoder.dtype, encoder.vocabulary
            )
            for split in SPLITS
        }
        self._documents = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._batch: list[tuple[str, str]] = []
        self._batch_bytes = 0

    def add(self, text: str, data: bytes, split: str) -> None:
        """Append a document, given as str and as UTF-8, to `split`."""
        self._documents[split] += 1
        self._bytes[split] += len(data)
        self._batch.append((split, text))
        self._batch_bytes += len(data)
        if self._batch_bytes >= _BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        """Finish all shards; the figures below are final after it."""
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def splits(self) -> dict[str, Split]:
        """The `splits` of the index."""
        return {
            name: Split(
                documents=self._documents[name],
                tokens=writer.tokens,
                bytes=self._bytes[name],
                shards=writer.shards,
            )
            for name, writer in self._writers.items()
        }

    def unigram_bits_per_byte(self) -> float:
        """See `nlscale.data.index.Index`."""
        return (
            unigram_bits(self._writers["train"].counts, self._writers["validation"].counts)
            / self._bytes["validation"]
        )

    def _flush(self) -> None:
        encoded = self._encoder.encode_batch([text for _, text in self._batch])
        for (split, _), ids in zip(self._batch, encoded, strict=True):
            self._writers[split].write(ids)
            self._writers[split].write(self._separator)
        self._batch.clear()
        self._batch_bytes = 0


def unigram_bits(train: NDArray[np.int64], validation: NDArray[np.int64]) -> float:
    """Bits to code tokens counted in `validation` by the frequencies of `train`, add-one smoothed.

    Both are int64 [vocabulary]; -sum_t validation_t log2((train_t + 1) / sum_u (train_u + 1)).
    """
    smoothed = train.astype(np.float64) + 1.0
    return float(-(validation * np.log2(smoothed / smoothed.sum())).sum())


class _HashedFile:
    """A file being written, with the size and sha256 of what was written so far."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._failed = False
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        if self._failed:
            # A tar stream finishes itself when it is collected; failing on the full disk again
            # there would print a second error after the one that was reported.
            return len(data)
        self.size += len(data)
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError:
            self._failed = True
            raise

    def close(self) -> None:
        # The index is synced after the shards, so a power cut cannot leave an index
        # that promises shards which never reached the disk.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

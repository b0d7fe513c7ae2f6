"""Random access to the tokens of a built data folder, after checking that it is whole."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlscale.data.index import MASKED_FORMAT, Index, read_index
from nlscale.data.verified import Hashing, State, altered, not_remembered, remember, state_of
from nlscale.errors import UserError

_OPEN_FILES = 64  # a large corpus has more shards than a process may hold open files


class TokenShards:
    """The tokens of one split, as one long sequence.

    Args:
        directory: a folder made by `nlscale data build`
        split: "train" or "validation"
        verify: also compare each shard's sha256, unless `.verified.json` beside the index records
            that a file of this size and modification time has passed before, as it does of a build.
            The first time reads every byte: of many ranks, those that train share that
            (`nlscale.train.verify_data`).

    Fields: `tokens` (int), `documents` (int), `vocabulary` (int), `separator` (the id that
    follows each document), `masked` (whether some tokens may not count as targets),
    `counted_tokens` (those that do), `bytes_per_token` (UTF-8 bytes of text a token that counts,
    separators among them; 0 where they stand for no text, or none counts), `index`, `shards`
    (their entries in it), `states` (what was seen of each shard by name, see
    `nlscale.data.verified`).

    Safe to use after a fork, pickled, and from several processes at once, not from several threads.

    Raises:
        UserError: a missing folder, an unknown split, and a missing or altered shard.
    """

    def __init__(self, directory: str | Path, split: str = "train", verify: bool = True) -> None:
        self.directory = Path(directory)
        self.split = split
        self.index: Index = read_index(directory)
        if split not in self.index["splits"]:
            raise UserError(f"no split {split!r}; use one of {', '.join(self.index['splits'])}")
        entry = self.index["splits"][split]
        self.shards = entry["shards"]
        # Sizes first: a missing shard is reported at once, not after an hour of hashing.
        self.states: dict[str, State] = {
            shard["name"]: state_of(self.directory, shard) for shard in self.shards
        }
        if verify:
            self._verify()
        self.tokens = entry["tokens"]
        self.documents = entry["documents"]
        self.vocabulary = self.index["vocabulary"]
        self.separator = self.index["separator"]
        self.masked = self.index["format"] == MASKED_FORMAT
        self.counted_tokens = entry["counted_tokens"] if self.masked else entry["tokens"]
        text = entry["counted_bytes"] if self.masked else entry["bytes"]
        self.bytes_per_token = text / max(1, self.counted_tokens)
        self._dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        # _starts[i] is the position in the split of the first token of shard i.
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in self.shards])
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens start .. start + count - 1 of the split: int64 [count].

        Raises:
            IndexError: outside the split.
            UserError: a shard has become unreadable.
        """
        parts = self._parts(start, count)
        result = np.empty(count, dtype=np.int64)
        for number, local, part in parts:
            self._read_shard(number, local, result[part])
        return result

    def read_mask(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which of the tokens start .. start + count - 1 count: bool [count]; None: all of all.

        Raises:
            IndexError: outside the split.
            UserError: a shard has become unreadable.
        """
        if not self.masked:
            return None
        parts = self._parts(start, count)
        result = np.empty(count, dtype=np.bool_)
        for number, local, part in parts:
            self._read_shard_mask(number, local, result[part])
        return result

    def _parts(self, start: int, count: int) -> list[tuple[int, int, slice]]:
        """The shards that hold a range: number, first token in it, and where that goes."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} .. {start + count} of {self.tokens}")
        parts: list[tuple[int, int, slice]] = []
        done = 0
        while done < count:
            number = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            local = start + done - int(self._starts[number])
            here = min(count - done, self.shards[number]["tokens"] - local)
            parts.append((number, local, slice(done, done + here)))
            done += here
        return parts

    def _read_shard(self, number: int, start: int, result: NDArray[np.int64]) -> None:
        """Fill `result` with the tokens of one shard from `start` on, in one read call."""
        shard, block, width = self.shards[number], self.index["block_tokens"], self._dtype.itemsize

        def place(token: int) -> int:
            return shard["offset"] + token // block * shard["stride"] + token % block * width

        begin = place(start)
        size = place(start + len(result) - 1) + width - begin
        data = self._pread(number, begin, size)
        done = 0
        while done < len(result):  # step over the tar header between one block and the next
            token = start + done
            here = min(len(result) - done, block - token % block)
            result[done : done + here] = np.frombuffer(
                data, self._dtype, count=here, offset=place(token) - begin
            )
            done += here
        # The checksum is of the index, and the index may come from anywhere.
        if len(result) and int(result.max()) >= self.vocabulary:
            raise altered(
                self.directory / shard["name"],
                f"it holds the id {result.max()}, the vocabulary has {self.vocabulary:,}",
            )

    def _read_shard_mask(self, number: int, start: int, result: NDArray[np.bool_]) -> None:
        """Fill `result` with the mask of one shard from `start` on, in one read call a block."""
        shard, size = self.shards[number], self.index["block_tokens"]
        done = 0
        while done < len(result):
            block, token = divmod(start + done, size)
            here = min(len(result) - done, size - token)
            first, skipped = divmod(token, 8)
            offset = shard["mask_offset"] + block * shard["stride"] + first
            data = self._pread(number, offset, -(-(skipped + here) // 8))
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            result[done : done + here] = bits[skipped : skipped + here]
            done += here

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        # Not a memory map: a shard truncated or a file system lost during training would then
        # kill the process with SIGBUS instead of raising an error that names the shard.
        path = self.directory / self.shards[number]["name"]
        try:
            descriptor = self._descriptor(number, path)
            data = b""
            while len(data) < size:
                part = os.pread(descriptor, size - len(data), offset + len(data))
                if not part:
                    raise OSError("the file is shorter than when it was opened")
                data += part
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error}; restore or rebuild it") from error
        return data

    def _descriptor(self, number: int, path: Path) -> int:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[number]

    def close(self) -> None:
        """Close the shard files; a later `read` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # In a spawned process the same descriptor numbers would be other files.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # absent when the constructor refused the folder
            self.close()

    def _verify(self) -> None:
        unknown = set(not_remembered(self.directory, self.states))
        if not unknown:
            return
        shards = [shard for shard in self.shards if shard["name"] in unknown]
        with Hashing(self.directory, shards, min(8, os.cpu_count() or 1)) as hashing:
            hashing.wait()
            if (error := hashing.so_far().error) is not None:
                raise error
        # A read-only data folder is legitimate: it is only checked again next time.
        with contextlib.suppress(OSError):
            remember(self.directory, {name: self.states[name] for name in unknown})

"""Random access to the tokens of a built data folder, after checking that it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nlscale.config.urls import Location, inside, is_url
from nlscale.data.index import MASKED_FORMAT, Index, Shard, read_index
from nlscale.data.local import LocalFolder
from nlscale.data.remote.service import Patience
from nlscale.data.verified import State, altered
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.config.vocabulary import CacheConfig


class Reads(Protocol):
    """What gives the bytes of shards: a folder on this machine, or on another service."""

    fetches: bool
    """Whether shards are fetched from elsewhere before they are read."""

    def states(self, shards: Sequence[Shard]) -> dict[str, State]:
        """What is seen of each, by name, where that is seen without asking for each."""

    def check(self, shards: Sequence[Shard]) -> None:
        """Whether they are as the index says, as far as that is known. Raises UserError."""

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises UserError: it cannot be read."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """These will be needed next, the first first."""

    def close(self) -> None:
        """Let go of what is open; a later read opens it again."""

    def twin(self) -> Reads:
        """One that another thread may use at the same time."""


class TokenShards:
    """The tokens of one split, as one long sequence.

    Args:
        directory: a folder made by `nlscale data build`, or a URL of one.
        split: "train" or "validation"
        verify: also compare each shard's sha256, unless `.verified.json` beside the index records
            that a file of this size and modification time has passed before, as it does of a build.
            The first time reads every byte: of many ranks, those that train share that
            (`nlscale.train.verify_data`). Behind a URL see that each is there with its size: its
            sha256 is compared when it is fetched.
        cache: where shards behind a URL are kept, and how they are fetched.

    Of packed data each token of the last sample has a next one too: a separator that is not stored,
    and does not count, ends the sequence.

    Fields: `tokens` (int), `documents` (int), `vocabulary` (int), `separator` (the id that
    follows each document), `masked` (whether some tokens may not count as targets),
    `counted_tokens` (those that do), `bytes_per_token` (UTF-8 bytes of text a token that counts,
    separators among them; 0 where they stand for no text, or none counts), `index`, `shards`
    (their entries in it), `folder` (what reads them), `states` (what was seen of each shard by
    name, see `nlscale.data.verified`; nothing behind a URL).

    Safe to use after a fork, pickled, and from several processes at once, not from several threads.

    Raises:
        UserError: a missing folder, an unknown split, and a missing or altered shard.
    """

    def __init__(
        self,
        directory: Location,
        split: str = "train",
        verify: bool = True,
        cache: CacheConfig | None = None,
    ) -> None:
        patience = None if cache is None else Patience(cache.timeout, cache.retries)
        index = read_index(directory, patience)
        folder = _opened(directory, cache)
        self._begin(folder, directory, index, split)
        if verify:
            folder.check(self.shards)

    def beside(self, split: str) -> TokenShards:
        """Another split of the same folder, not verified; another thread may read it."""
        other = TokenShards.__new__(TokenShards)
        other._begin(self.folder.twin(), self.directory, self.index, split)
        return other

    def _begin(self, folder: Reads, directory: Location, index: Index, split: str) -> None:
        self.directory: Location = directory if is_url(directory) else Path(directory)
        self.split, self.index, self.folder = split, index, folder
        if split not in self.index["splits"]:
            raise UserError(f"no split {split!r}; use one of {', '.join(self.index['splits'])}")
        entry = self.index["splits"][split]
        self.shards = entry["shards"]
        # Sizes first: a missing shard is reported at once, not after an hour of hashing.
        self.states: dict[str, State] = folder.states(self.shards)
        self._stored = entry["tokens"]
        self.tokens = entry["tokens"] + ("packed" in self.index)
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

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens start .. start + count - 1 of the split: int64 [count].

        Raises:
            IndexError: outside the split.
            UserError: a shard has become unreadable.
        """
        parts = self._parts(start, count)
        result = np.full(count, self.separator, dtype=np.int64)
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
        result = np.zeros(count, dtype=np.bool_)
        for number, local, part in parts:
            self._read_shard_mask(number, local, result[part])
        return result

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tokens that will be read soon, (start, count), the first first: for reading ahead."""
        if not self.folder.fetches:
            return
        numbers = (number for start, count in ranges for number, _, _ in self._parts(start, count))
        self.folder.expect([self.shards[number] for number in dict.fromkeys(numbers)])

    def close(self) -> None:
        """Close the shard files; a later `read` opens them again."""
        self.folder.close()

    def _parts(self, start: int, count: int) -> list[tuple[int, int, slice]]:
        """The shards that hold a range: number, first token in it, and where that goes."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} .. {start + count} of {self.tokens}")
        count = min(count, max(0, self._stored - start))
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
        data = self.folder.pread(shard, begin, size)
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
                inside(self.directory, shard["name"]),
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
            data = self.folder.pread(shard, offset, -(-(skipped + here) // 8))
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            result[done : done + here] = bits[skipped : skipped + here]
            done += here


def _opened(directory: Location, cache: CacheConfig | None) -> Reads:
    if not is_url(directory):
        return LocalFolder(Path(directory))
    # here, for those who need it: reading what is here takes numpy alone
    from nlscale.data.remote.folder import RemoteFolder

    return RemoteFolder(directory, cache)

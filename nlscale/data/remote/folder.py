"""A data folder on another service, read through the cache of this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from nlscale.config.units import read_bytes
from nlscale.config.vocabulary import CacheConfig
from nlscale.data.index import Shard
from nlscale.data.remote.ahead import Ahead
from nlscale.data.remote.cache import Cache
from nlscale.data.remote.opening import ServiceError
from nlscale.data.remote.service import Missing, Patience, Refused, Service
from nlscale.data.verified import State, altered
from nlscale.errors import LostRank, UserError

_AHEAD_SHARE = 2
"""Shards that are read ahead take at most one part in so many of the cache."""


class Unreachable(ServiceError):
    """A service that has failed a run; starting again may help, as after a rank that was lost."""

    exit_code = LostRank.exit_code


class _Lied(Exception):
    """How a shard differs from the index."""


class RemoteFolder:
    """The shards of a data folder on another service. May be used by several threads.

    Args:
        url: of the folder.
        config: where shards are kept, and how they are fetched; None: as a run has it by default.

    Raises:
        UserError: no such service, no size, or a cache that cannot be written.
    """

    fetches = True

    def __init__(self, url: str, config: CacheConfig | None = None) -> None:
        self.url = url
        self.config = config = config or CacheConfig()
        self.service = Service(url, Patience(config.timeout, config.retries))
        self._size = cache_size(config)
        self._ahead = Ahead(config.threads, self._fetch_ahead)

    @cached_property
    def cache(self) -> Cache:
        """Where shards are kept, made when the first is wanted. Raises UserError: it cannot be."""
        patience = self.service.patience
        silence = patience.most(0) + patience.timeout  # a fetch without a byte ends before
        return Cache(cache_folder(self.config), self._size, silence)

    def states(self, shards: Sequence[Shard]) -> dict[str, State]:
        """Nothing: the sha256 of a shard is compared whenever it is fetched."""
        return {}

    def check(self, shards: Sequence[Shard]) -> None:
        """See in one listing that the shards are there, where the protocol has a listing.

        Raises:
            UserError: one is missing or of another size, or the service cannot be asked.
        """
        there = self.service.listing()
        if there is None:
            return
        for shard in shards:
            path = f"{self.url}/{shard['name']}"
            size = there.get(shard["name"])
            if size is None:
                raise UserError(f"shard {path} is missing; copy the folder there again")
            if size != shard["size_bytes"]:
                said = shard["size_bytes"]
                raise altered(path, f"it has {size:,} bytes, the index says {said:,}")

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched where it is not there. Raises UserError."""
        with self._opened(shard) as descriptor:
            data = b""
            while len(data) < size:
                part = os.pread(descriptor, size - len(data), offset + len(data))
                if not part:
                    raise UserError(
                        f"{self.cache.directory / shard['sha256']} has become shorter; leave what "
                        f"is in data.cache.dir alone"
                    )
                data += part
            return data

    def expect(self, shards: Sequence[Shard]) -> None:
        """Fetch beside the reading what will be needed, the first first, as far as it may."""
        room, wanted = self.cache.size // _AHEAD_SHARE, []
        for shard in shards:
            room -= shard["size_bytes"]
            if room < 0:
                break
            if not self.cache.has(shard):
                wanted.append(shard)
        self._ahead.want(wanted)

    def close(self) -> None:
        """Read nothing ahead any more."""
        self._ahead.want([])

    def twin(self) -> RemoteFolder:
        """Itself: several threads may use it."""
        return self

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str, CacheConfig]]:
        return RemoteFolder, (self.url, self.config)

    def _opened(self, shard: Shard) -> AbstractContextManager[int]:
        patience = self.service.patience.most(shard["size_bytes"])
        return self.cache.opened(shard, lambda file: self._fetch(shard, file), patience)

    def _fetch_ahead(self, shard: Shard) -> None:
        with self._opened(shard):
            pass

    def _fetch(self, shard: Shard, file: BinaryIO) -> None:
        """Write a shard into an empty file; one that lies is fetched once more."""
        try:
            try:
                self.service.again(shard["name"], lambda: self._copy(shard, file))
            except _Lied:
                self.service.again(shard["name"], lambda: self._copy(shard, file))
        except _Lied as lie:
            raise altered(f"{self.url}/{shard['name']}", f"{lie}, fetched twice") from None
        except (Missing, Refused):
            raise
        except ServiceError as error:
            raise Unreachable(str(error)) from error

    def _copy(self, shard: Shard, file: BinaryIO) -> None:
        size, digest, got = shard["size_bytes"], hashlib.sha256(), 0
        file.seek(0)
        file.truncate()
        for piece in self.service.pieces(shard["name"], size):
            got += len(piece)
            if got > size:
                raise _Lied(f"it has more than the {size:,} bytes of the index")
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != shard["sha256"]:
            raise _Lied("its sha256 differs from the index")


def cache_folder(config: CacheConfig) -> Path:
    """Where shards are kept: `data.cache.dir`, else where this user's programs keep such things."""
    if config.dir is not None:
        return Path(config.dir)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nlscale" / "shards"


def cache_size(config: CacheConfig) -> int:
    """Bytes of `data.cache.size`. Raises UserError: it is no size."""
    try:
        return read_bytes(config.size)
    except ValueError as error:
        raise UserError(f"data.cache.size {error}") from None

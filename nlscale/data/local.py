"""The shards of a data folder on this machine's file system."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlscale.data.index import Shard
from nlscale.data.verified import Hashing, State, not_remembered, remember, state_of
from nlscale.errors import UserError

_OPEN_FILES = 64  # a large corpus has more shards than a process may hold open files


class LocalFolder:
    """Reads shards where they lie.

    Safe to use after a fork, pickled, and from several processes at once, not from several threads.

    Args:
        directory: of the data.
    """

    fetches = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, int] = OrderedDict()

    def states(self, shards: Sequence[Shard]) -> dict[str, State]:
        """What is seen of each, by name. Raises UserError: one is missing or of another size."""
        return {shard["name"]: state_of(self.directory, shard) for shard in shards}

    def check(self, shards: Sequence[Shard]) -> None:
        """Compare with their sha256 those that nobody has seen to be whole, and remember it.

        Raises:
            UserError: one is missing or altered.
        """
        states = self.states(shards)
        unknown = set(not_remembered(self.directory, states))
        if not unknown:
            return
        todo = [shard for shard in shards if shard["name"] in unknown]
        with Hashing(self.directory, todo, min(8, os.cpu_count() or 1)) as hashing:
            hashing.wait()
            if (error := hashing.so_far().error) is not None:
                raise error
        # A read-only data folder is legitimate: it is only checked again next time.
        with contextlib.suppress(OSError):
            remember(self.directory, {name: states[name] for name in unknown})

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises UserError: it has become unreadable."""
        # Not a memory map: a shard truncated or a file system lost during training would then
        # kill the process with SIGBUS instead of raising an error that names the shard.
        path = self.directory / shard["name"]
        try:
            descriptor = self._descriptor(shard["name"], path)
            data = b""
            while len(data) < size:
                part = os.pread(descriptor, size - len(data), offset + len(data))
                if not part:
                    raise OSError("the file is shorter than when it was opened")
                data += part
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error}; restore or rebuild it") from error
        return data

    def expect(self, shards: Sequence[Shard]) -> None:
        """Nothing: they are here."""

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def twin(self) -> LocalFolder:
        """One that another thread may use at the same time."""
        return LocalFolder(self.directory)

    def _descriptor(self, name: str, path: Path) -> int:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        # In a spawned process the same descriptor numbers would be other files.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

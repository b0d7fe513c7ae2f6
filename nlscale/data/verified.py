"""Which shards of a data folder are known to be whole, and hashing those that are not.

`.verified.json` beside the index remembers of which size and modification time a shard was when its
sha256 was last seen to be that of the index: when it was written, or when a run first read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from types import TracebackType
from typing import Any

from nlscale.config.urls import Location
from nlscale.data.index import Shard, write_json
from nlscale.errors import UserError

VERIFIED_NAME = ".verified.json"
_CHUNK = 1 << 20
State = list[Any]
"""What is remembered of a shard: size, modification time in ns, sha256."""


def state_of(directory: Path, shard: Shard) -> State:
    """What would be remembered of a shard as it lies there, were its sha256 that of the index.

    Raises:
        UserError: it is missing, no file, or of another size.
    """
    path = f"{directory}/{shard['name']}"
    try:
        stat = os.stat(path)  # of thousands: a Path takes longer than the call
    except OSError as error:
        raise UserError(
            f"shard {path} is missing ({error.strerror}); restore it, or build the data again "
            "with --overwrite"
        ) from None
    if not S_ISREG(stat.st_mode):
        raise altered(path, "it is not a file")
    if stat.st_size != shard["size_bytes"]:
        raise altered(
            path, f"it has {stat.st_size:,} bytes, the index says {shard['size_bytes']:,}"
        )
    return [stat.st_size, stat.st_mtime_ns, shard["sha256"]]


def altered(path: Location, how: str) -> UserError:
    """What to raise of a shard that is not as it was built."""
    return UserError(
        f"shard {path} was altered: {how}; restore it, or build the data again with --overwrite"
    )


def not_remembered(directory: Path, states: Mapping[str, State]) -> list[str]:
    """Names of the shards that, in these states, nobody has seen to be whole."""
    known = _read(directory / VERIFIED_NAME)
    return [name for name, state in states.items() if known.get(name) != state]


def remember(directory: Path, states: Mapping[str, State]) -> None:
    """Note that these shards, in these states, are whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path = directory / VERIFIED_NAME
    write_json(path, {**_read(path), **states})


def forget(directory: Path, names: Iterable[str]) -> None:
    """Take back that these shards are whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path, names = directory / VERIFIED_NAME, set(names)
    known = _read(path)
    if not names.isdisjoint(known):
        write_json(path, {name: state for name, state in known.items() if name not in names})


def _read(path: Path) -> dict[str, Any]:
    # One that cannot be read only costs time: the shards are hashed again.
    try:
        known = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


@dataclass(frozen=True)
class SoFar:
    """How far a `Hashing` is."""

    bytes: int
    """Read."""
    whole: tuple[str, ...]
    """Shards that have their sha256."""
    over: bool
    """Nothing more comes: all are whole, or one is not."""
    error: BaseException | None
    """A UserError where a shard was altered or cannot be read."""


class Hashing:
    """Compares shards with their sha256 in threads of its own, while it is entered.

    Args:
        directory: of the data.
        shards: to compare, in this order.
        threads: at most so many.
        reader: who reads, to be named where a shard was altered.
    """

    def __init__(
        self, directory: Path, shards: Sequence[Shard], threads: int, reader: str = ""
    ) -> None:
        self._directory, self._as_read = directory, f" as {reader} reads it" if reader else ""
        self._waiting = deque(shards)
        self._threads = min(threads, len(shards))
        self._working = self._threads
        self._bytes = 0
        self._whole: list[str] = []
        self._error: BaseException | None = None
        self._read_at: dict[Path, float] = {}
        self._lock = threading.Lock()
        self._over, self._left = threading.Event(), threading.Event()
        if not shards:
            self._over.set()

    def __enter__(self) -> Hashing:
        # Daemons: one that waits for a file system that is gone must not keep the process.
        for _ in range(self._threads):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is over, or for that long."""
        self._over.wait(seconds)

    def so_far(self) -> SoFar:
        """How far it is."""
        with self._lock:
            over = self._over.is_set()
            return SoFar(self._bytes, tuple(self._whole), over, self._error)

    def stuck(self, seconds: float) -> Path | None:
        """A shard that is being read and of which no byte has come for so long, if there is one."""
        now = time.monotonic()
        with self._lock:
            since, path = min(((t, p) for p, t in self._read_at.items()), default=(now, None))
        return path if now - since > seconds else None

    def _work(self) -> None:
        try:
            while not self._left.is_set() and self._error is None:
                try:
                    shard = self._waiting.popleft()
                except IndexError:
                    break
                self._compare(shard)
        except BaseException as error:  # the one who waits raises it
            with self._lock:
                self._error = self._error or error
        with self._lock:
            self._working -= 1
            if self._error is not None or not self._working:
                self._over.set()

    def _compare(self, shard: Shard) -> None:
        path = self._directory / shard["name"]
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        self._saw(path, 0)
        try:
            with open(path, "rb", buffering=0) as file:
                while size := _read_into(file, buffer):
                    if self._left.is_set():
                        return
                    digest.update(buffer[:size])
                    self._saw(path, size)
        except OSError as error:
            raise UserError(
                f"cannot read shard {path}{self._as_read}: {error}; restore or rebuild it"
            ) from error
        if digest.hexdigest() != shard["sha256"]:
            raise altered(path, f"its sha256{self._as_read} differs from the index")
        with self._lock:
            self._whole.append(shard["name"])
            del self._read_at[path]

    def _saw(self, path: Path, size: int) -> None:
        with self._lock:
            self._bytes += size
            self._read_at[path] = time.monotonic()


def _read_into(file: Any, buffer: memoryview) -> int:
    """Read what comes next of an unbuffered file; the number of bytes, 0 at its end."""
    return file.readinto(buffer) or 0

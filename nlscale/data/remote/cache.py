"""Shards of other services on this machine: a folder of bounded size that processes share.

A shard is called by its sha256, so that one that is there is the one that is asked for, whichever
folder it came from and whatever lies there by now:

    <sha256>                      whole, compared with its sha256 before it got this name
    <sha256>.<bytes>.<id>.partial being fetched; so many bytes are set aside for it
    locks/<sha256>                held by who fetches it, or waits for who does
    lock                          held while room is made

Locks are the kernel's (flock), which lets go of them when a process is killed. Who reads a shard
holds a shared one on the file itself, and only a file on which nobody does is removed; a partial
file on which nobody holds one is of a process that is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nlscale.config.units import human_bytes
from nlscale.data.index import Shard
from nlscale.errors import UserError

_PARTIAL = ".partial"
_LOOK_SECONDS = 0.05
"""Between two looks whether there is room."""


@dataclass(frozen=True)
class _Entry:
    path: str
    size: int
    used: int
    """When it was last opened, in ns; 0: partial."""


class Cache:
    """Keeps shards in a folder, the least recently used of which give way to others.

    What it holds never takes more than `size` bytes, those being fetched among them. May be used by
    several threads and processes.

    Args:
        directory: which is made; of this machine, where it should be fast.
        size: bytes at most.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.directory, self.size = directory, size
        with self._written():
            (directory / "locks").mkdir(parents=True, exist_ok=True)
            with self._locked(directory / "lock"):
                pass

    def has(self, shard: Shard) -> bool:
        """Whether a shard is there, at this moment."""
        return (self.directory / shard["sha256"]).exists()

    def used(self) -> int:
        """Bytes that it takes."""
        return sum(entry.size for entry in self._entries())

    @contextmanager
    def opened(
        self, shard: Shard, fetch: Callable[[BinaryIO], None], patience: float
    ) -> Iterator[int]:
        """A descriptor of a whole shard, which is not removed before this is left.

        Args:
            shard: that is wanted.
            fetch: writes it, whole, into an empty file; called where nobody has it, by one process
                at a time.
            patience: seconds to wait for room.

        Raises:
            UserError: the disk is full; there is no room for so long; and what `fetch` raises.
        """
        with self._written():
            descriptor = self._present(shard)
            if descriptor is None:
                with self._locked(self.directory / "locks" / shard["sha256"]):
                    descriptor = self._present(shard)  # fetched by who held the lock
                    if descriptor is None:
                        descriptor = self._fetched(shard, fetch, patience)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _present(self, shard: Shard) -> int | None:
        """A shard that is there, held; None: it is not."""
        path = self.directory / shard["sha256"]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # of another size where somebody else has written there: it is replaced
            whole = os.fstat(descriptor).st_size == shard["size_bytes"]
            if whole and _is(path, descriptor):
                _use(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fetched(self, shard: Shard, fetch: Callable[[BinaryIO], None], patience: float) -> int:
        """A shard that was fetched, held."""
        size, final = shard["size_bytes"], self.directory / shard["sha256"]
        partial = self.directory / f"{final.name}.{size}.{uuid.uuid4().hex}{_PARTIAL}"
        descriptor = self._reserved(partial, size, patience)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                fetch(file)
                file.flush()
                _use(descriptor)
                os.fsync(descriptor)  # or the name would outlive the bytes in a crash
            # nobody makes room meanwhile: it is counted once, and held throughout
            with self._locked(self.directory / "lock"):
                os.rename(partial, final)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _reserved(self, partial: Path, size: int, patience: float) -> int:
        """A new file for which there is room, held; waits for room for so many seconds."""
        began = time.monotonic()
        while True:
            with self._locked(self.directory / "lock"):
                held = self._make_room(size)
                if held + size <= self.size:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    descriptor = os.open(partial, flags, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    return descriptor
            if time.monotonic() - began > patience:
                raise UserError(
                    f"{self.directory} has no room for a shard of {human_bytes(size)}: "
                    f"{human_bytes(held)} of {human_bytes(self.size)} have been read or fetched by "
                    f"this and other processes for {patience:.0f} s; give a larger data.cache.size"
                )
            time.sleep(_LOOK_SECONDS)

    def _make_room(self, size: int) -> int:
        """Remove what was used least recently, so far as it is not in use; bytes that stay."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        held = sum(entry.size for entry in entries)
        for entry in entries:
            # partial ones come first, of which those that are left behind serve nobody
            if entry.used and held + size <= self.size:
                break
            if _remove_unused(entry.path):
                held -= entry.size
        return held

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.directory) as files:
            for file in files:
                if file.name.endswith(_PARTIAL):
                    found.append(_Entry(file.path, int(file.name.split(".")[1]), 0))
                elif len(file.name) == 64:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        stat = file.stat()
                        found.append(_Entry(file.path, stat.st_size, stat.st_mtime_ns))
        return found

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Make of what the disk says an error that names the key."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "make room, or give a smaller data.cache.size" if full else "mend that"
            raise UserError(
                f"cannot write {self.directory}: {error.strerror}; {fix}, or give another "
                f"data.cache.dir"
            ) from error


def _use(descriptor: int) -> None:
    """Make a file the one that was used last."""
    now = time.time_ns()  # the file system's own clock is coarse
    os.utime(descriptor, ns=(now, now))


def _is(path: Path, descriptor: int) -> bool:
    """Whether an open file still has that name."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _remove_unused(path: str) -> bool:
    """Remove a file unless somebody holds it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)

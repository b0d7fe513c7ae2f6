"""Shards of other services on this machine: a folder of bounded size that processes share.

A shard is called by its sha256, so that one that is there is the one that is asked for, whichever
folder it came from and whatever lies there by now:

    <sha256>                      whole, compared with its sha256 before it got this name
    <sha256>.<bytes>.<id>.partial being fetched; so many bytes are set aside for it
    whole/<sha256>                its size and modification time when that was compared: where they
                                  are others, somebody has written there, and it is compared again
    locks/<sha256>                held by who fetches or compares it, and says who that is
    lock                          held while room is made

Locks are the kernel's (flock), which lets go of them when a process is killed. Who reads a shard
holds a shared one on the file itself, and only a file on which nobody does is removed; a partial
file on which nobody holds one is of a process that is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
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
"""Between two looks whether there is room, or a lock is free; the first come sooner."""
_CHUNK = 1 << 20  # bytes that are hashed at once
_SILENCE = 600.0  # seconds


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
        silence: seconds for which another process that is waited for may do nothing.

    Raises:
        UserError: the folder cannot be written, or used, because of a process that does nothing.
    """

    def __init__(self, directory: Path, size: int, silence: float = _SILENCE) -> None:
        self.directory, self.size, self._silence = directory, size, silence
        self._known: dict[str, str] = {}
        with self._written():
            for name in ("locks", "whole"):
                (directory / name).mkdir(parents=True, exist_ok=True)
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
            UserError: the disk is full; there is no room for so long; who fetches it does nothing;
                and what `fetch` raises.
        """
        with self._written():
            descriptor = self._present(shard)
            if descriptor is None:
                path = self.directory / "locks" / shard["sha256"]
                with self._locked(path, shard["sha256"]) as lock:
                    # fetched by who held the lock, or not known to be whole
                    descriptor = self._present(shard, lock)
                    if descriptor is None:
                        descriptor = self._fetched(shard, fetch, patience, lock)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _present(self, shard: Shard, lock: int | None = None) -> int | None:
        """A shard that is there, held; None: it is not, or not known to be whole.

        Args:
            shard: that is wanted.
            lock: on it, of who compares it where that is not known; None: nobody does.
        """
        path = self.directory / shard["sha256"]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # another one where somebody else has written there: it is replaced
            if self._whole(shard, descriptor, lock) and _is(path, descriptor):
                _use(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _whole(self, shard: Shard, descriptor: int, lock: int | None) -> bool:
        """Whether an open file is the shard; without a lock, whether that is known."""
        name, state = shard["sha256"], _state(descriptor)
        if os.fstat(descriptor).st_size != shard["size_bytes"]:
            return False
        if self._known.get(name) == state:
            return True
        note = self.directory / "whole" / name
        with suppress(FileNotFoundError):
            if note.read_text(errors="replace") == state:
                self._known[name] = state
                return True
        if lock is None or _sha256(descriptor, lock) != name:
            return False
        self._note(name, descriptor)
        return True

    def _note(self, name: str, descriptor: int) -> None:
        """Remember that an open file is whole: on this machine, and in this process."""
        self._known[name] = state = _state(descriptor)
        (self.directory / "whole" / name).write_text(state)

    def _fetched(
        self, shard: Shard, fetch: Callable[[BinaryIO], None], patience: float, lock: int
    ) -> int:
        """A shard that was fetched, held."""
        size, final = shard["size_bytes"], self.directory / shard["sha256"]
        partial = self.directory / f"{final.name}.{size}.{uuid.uuid4().hex}{_PARTIAL}"
        descriptor = self._reserved(partial, size, patience, lock)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                fetch(file)
                file.flush()
                os.fsync(descriptor)  # or the name would outlive the bytes in a crash
            _use(descriptor)
            self._note(final.name, descriptor)
            # nobody makes room meanwhile: it is counted once, and held throughout
            with self._locked(self.directory / "lock"):
                os.rename(partial, final)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _reserved(self, partial: Path, size: int, patience: float, lock: int) -> int:
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
            os.utime(lock)  # a sign of life
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
                (self.directory / "whole" / os.path.basename(entry.path)).unlink(missing_ok=True)
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
                        found.append(_Entry(file.path, stat.st_size, stat.st_atime_ns))
        return found

    @contextmanager
    def _locked(self, path: Path, shard: str | None = None) -> Iterator[int]:
        """Hold a lock; its descriptor. One of a shard, of that sha256, is gone afterwards.

        Raises:
            UserError: who holds it gives no sign of life.
        """
        descriptor = self._taken(path, shard)
        try:
            yield descriptor
        finally:
            if shard is not None:
                path.unlink(missing_ok=True)  # still held: who waits for it sees that it has gone
            os.close(descriptor)

    def _taken(self, path: Path, shard: str | None) -> int:
        """A lock that is held."""
        since, seen, pause = time.monotonic(), self._signs(path, shard), 0.001
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(path, descriptor):
                    os.ftruncate(descriptor, 0)
                    os.write(
                        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
                    return descriptor
            except BlockingIOError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() - since > self._silence:
                since, before, seen = time.monotonic(), seen, self._signs(path, shard)
                if seen == before:
                    raise UserError(
                        f"{path} is held by {seen[0] or 'another process'}, which has done nothing "
                        f"for {self._silence:.0f} s; let it go on (kill -CONT) or end it, then "
                        f"start again"
                    )
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)

    def _signs(self, path: Path, shard: str | None) -> tuple[str, ...]:
        """Who holds a lock, and what changes while they do something."""
        signs = []
        with suppress(FileNotFoundError):
            signs = [path.read_text(errors="replace"), str(path.stat().st_mtime_ns)]
        for partial in self.directory.glob(f"{shard}.*{_PARTIAL}"):
            with suppress(FileNotFoundError):
                signs.append(f"{partial.name} {partial.stat().st_size}")
        return tuple(signs) or ("",)

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
    """Make a file the one that was used last, which its access time says."""
    now = time.time_ns()  # the file system's own clock is coarse
    os.utime(descriptor, ns=(now, os.fstat(descriptor).st_mtime_ns))


def _state(descriptor: int) -> str:
    """Of an open file what changes when somebody writes there."""
    stat = os.fstat(descriptor)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _sha256(descriptor: int, lock: int) -> str:
    """Of an open file; the lock that is held meanwhile shows that it goes on."""
    digest, at = hashlib.sha256(), 0
    while data := os.pread(descriptor, _CHUNK, at):
        digest.update(data)
        at += len(data)
        os.utime(lock)
    return digest.hexdigest()


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

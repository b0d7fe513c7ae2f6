"""Every change that a checkpoint makes on disk, one function each.

After each of them `on_operation` is called, so that a test can stop the process there, or fail it,
and see what a crash at that moment leaves.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

_BUFFER = 1 << 20  # bytes; few, large writes reach the disk, and hashing lets other threads run


def _nothing(operation: str) -> None:
    pass


on_operation: Callable[[str], None] = _nothing
"""For tests: called after each operation with its name and the name of the file or folder, such as
`write __0_0.distcp`, `sync step-00000002.partial`, `rename step-00000002.partial`."""


@dataclass(frozen=True)
class Digest:
    """What a file must be."""

    bytes: int
    sha256: str
    """In hexadecimal."""


class HashedFile(io.BufferedWriter):
    """A file being written, hashed on its way to the disk; closing it syncs it."""

    def __init__(self, path: Path) -> None:
        self._output = _Output(path, io.FileIO(path, "w"))
        super().__init__(cast(io.RawIOBase, self._output), _BUFFER)

    @property
    def digest(self) -> Digest:
        """Of what has reached the disk; of the whole file once it is closed."""
        return Digest(self._output.size, self._output.sha256.hexdigest())

    def drop(self) -> OSError | None:
        """Close without writing what is left; the first error of the disk, if there was one."""
        self._output.drop()
        return self._output.error


@contextmanager
def create(path: Path) -> Iterator[HashedFile]:
    """Write a new file, or an old one anew; it is on the disk once the block is left.

    Raises:
        OSError: what the disk said first, even if the block swallowed it or made another of it.
    """
    file = HashedFile(path)
    try:
        on_operation(f"create {path.name}")
        yield file
        file.close()
    except BaseException as error:
        cause = file.drop()
        if cause is None or cause is error:
            raise
        raise cause from error
    cause = file.drop()
    if cause is not None:
        raise cause


def write(path: Path, data: bytes) -> Digest:
    """Write a whole file, on the disk on return. Raises OSError."""
    with create(path) as file:
        file.write(data)
    return file.digest


def replace(path: Path, data: bytes) -> None:
    """Give a file new contents: whoever reads it sees the old or the new. Raises OSError."""
    new = path.with_name(f"{path.name}.tmp")
    write(new, data)
    rename(new, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; one that is there stays. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    on_operation(f"mkdir {path.name}")


def rename(old: Path, new: Path) -> None:
    """Rename a file, replacing one of the new name, or a folder. Raises OSError."""
    os.replace(old, new)
    on_operation(f"rename {old.name}")


def remove_file(path: Path) -> None:
    """Remove a file. Raises OSError."""
    path.unlink()
    on_operation(f"remove {path.name}")


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it, or a link to one. Raises OSError."""
    if path.is_symlink():
        remove_file(path)
        return
    with os.scandir(path) as entries:
        inside = list(entries)
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            remove_folder(Path(entry.path))
        else:
            remove_file(Path(entry.path))
    path.rmdir()
    on_operation(f"remove {path.name}")


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        # some network file systems have no such call: there names are on the server already
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(folder)
    on_operation(f"sync {path.name}")


def digest(path: Path) -> Digest:
    """Read a whole file and hash it. Raises OSError."""
    sha256, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            size += count
    return Digest(size, sha256.hexdigest())


def digest_of(data: bytes) -> Digest:
    """Of what has been read already."""
    return Digest(len(data), hashlib.sha256(data).hexdigest())


class _Output(io.RawIOBase):
    """The unbuffered end of a `HashedFile`."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self._path = path
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        if self.error is not None:
            # torch's zip writer goes on writing its end after an error, and would fail again,
            # where nothing can catch it
            return len(data)
        try:
            count = self._file.write(data)
            on_operation(f"write {self._path.name}")
        except OSError as error:
            self.error = self._named(error)
            raise self.error from error
        self.sha256.update(data[:count])
        self.size += count
        return count

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self.error is None:
                os.fsync(self._file.fileno())
                on_operation(f"sync {self._path.name}")
        except OSError as error:
            self.error = self._named(error)
            raise self.error from error
        finally:
            self.drop()

    def drop(self) -> None:
        super().close()
        self._file.close()

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))

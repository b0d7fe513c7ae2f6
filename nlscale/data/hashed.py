"""Files that are hashed while they are written, and syncing what they lie in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 20


class HashedFile:
    """A file being written, with the size and sha256 of what was written so far."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._failed = False
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append; the number of bytes. Raises OSError: the disk does, the first time."""
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
        """Close it when it is on the disk. Raises OSError."""
        # The index is synced after the shards, so a power cut cannot leave an index
        # that promises shards which never reached the disk.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

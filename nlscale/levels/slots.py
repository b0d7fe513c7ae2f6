"""A file on a drive that holds the state of a sync group, and says whether it is what was written.

    header   4,096 bytes: what the file is, its version, its length, the CRC-32 of what follows
    state    fp32, one row after the other of each shard; zeros up to a multiple of what is
             read and written at once

The file has no name: it goes with the process, however that ends. Checkpoints hold the state, and a
run that goes on writes its slots anew from one; what an earlier process has left is never read.
Drives fail in ways that no call reports (DeepSpeed's asynchronous reads and writes report none at
all), so that what comes back is compared with what was written: a byte that has flipped, a write
that was lost and a file that was cut short end the run, and are named.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from nlscale.errors import TrainingFailed, UserError

HEADER = 4096
"""Bytes before the state: what a drive writes as a whole, and direct I/O begins at."""
_MAGIC = b"nlscale tier 01\n"
_FIELDS = struct.Struct("<16sQQI")
_AT_ONCE = 2**24
"""Bytes that are read at once where a file is compared with its checksum."""


def slot_bytes(payload: int, threads: int) -> int:
    """Of the file of that much state: each thread reads and writes whole blocks of 4,096 bytes."""
    block = HEADER * threads
    return -(-(HEADER + payload) // block) * block


class Slot:
    """The file of a sync group on this rank.

    Args:
        folder: where it is.
        elements: fp32 values of the state.
        threads: that read and write it at once.
        what: to call it in messages.

    Raises:
        UserError: it cannot be made, or the drive has no room for it.
    """

    def __init__(self, folder: Path, elements: int, threads: int, what: str) -> None:
        self.folder, self.what = folder, what
        self.payload = 4 * elements
        self.size = slot_bytes(self.payload, threads)
        self.version = 0
        """Of what was written last."""
        self.dirty = True
        """Whether others have written to `values` since."""
        self._checked = False
        self._descriptor = _nameless(folder, self.size)
        self._map = mmap.mmap(self._descriptor, self.size)
        state = memoryview(self._map)[HEADER : HEADER + self.payload]
        # a rank may have nothing of a small group, and torch takes no empty buffer
        self.values: Tensor = torch.frombuffer(state or bytearray(4), dtype=torch.float32)[
            :elements
        ]
        """The state in the file, [elements], for who reads and writes it otherwise than a step:
        after `settle`, and until `dirty` is set."""

    @property
    def path(self) -> str:
        """A name for this process."""
        return f"/proc/self/fd/{self._descriptor}"

    def stamp(self, buffer: Tensor) -> None:
        """Make a slot that is about to be written the next version.

        Args:
            buffer: uint8 [size].
        """
        self.version += 1
        self._checked = False
        self._write_header(buffer.numpy().data)

    def compare(self, buffer: Tensor) -> None:
        """Whether a slot that was read is what was written.

        Raises:
            TrainingFailed: it is not.
        """
        there = buffer.numpy().data
        self._compare(bytes(there[: _FIELDS.size]), zlib.crc32(self._state(there)))

    def check_size(self) -> None:
        """Whether the file is as long as it was made.

        Raises:
            TrainingFailed: it is not.
        """
        found = os.fstat(self._descriptor).st_size
        if found < self.size:
            raise self.failed(f"the file has {found:,} of {self.size:,} bytes")

    def settle(self) -> None:
        """Let `values` be read: seal what others have written, or compare what is in the file.

        Raises:
            TrainingFailed: it is not what was written, or cannot be read or written.
        """
        if self.dirty:
            self.seal()
        if self._checked:
            return
        self.check_size()
        try:
            header = os.pread(self._descriptor, _FIELDS.size, 0)
            checksum, at, end = 0, HEADER, HEADER + self.payload
            while at < end:  # through the page cache, from which `values` are read then
                read = os.pread(self._descriptor, min(_AT_ONCE, end - at), at)
                if not read:
                    raise self.failed(f"the file ends after {at:,} bytes")
                checksum, at = zlib.crc32(read, checksum), at + len(read)
        except OSError as error:
            raise self.failed(f"it cannot be read: {error.strerror}") from error
        self._compare(header, checksum)
        self._checked = True

    def seal(self) -> None:
        """Make what others have written to `values` the next version.

        Raises:
            TrainingFailed: it cannot be written.
        """
        self.check_size()
        self.version += 1
        self._write_header(memoryview(self._map))
        try:
            self._map.flush()
        except OSError as error:
            raise self.failed(f"it cannot be written: {error.strerror}") from error
        self.dirty, self._checked = False, True

    def failed(self, why: str) -> TrainingFailed:
        """What to raise."""
        return TrainingFailed(
            f"{self.what} in tiers.folder {self.folder}: {why}; nothing of it was used. See to the "
            f"drive (dmesg, smartctl), or give another folder; the run goes on from its checkpoint"
        )

    def _state(self, slot: memoryview) -> memoryview:
        return slot[HEADER : HEADER + self.payload]

    def _write_header(self, slot: memoryview) -> None:
        checksum = zlib.crc32(self._state(slot))
        _FIELDS.pack_into(slot, 0, _MAGIC, self.version, self.payload, checksum)

    def _compare(self, header: bytes, checksum: int) -> None:
        magic, version, payload, was = _FIELDS.unpack(header)
        if (magic, payload) != (_MAGIC, self.payload):
            raise self.failed("its header is not what was written")
        if version != self.version:
            raise self.failed(f"it holds version {version:,}, and {self.version:,} was written")
        if checksum != was:
            raise self.failed(f"its checksum is {checksum:08x}, and {was:08x} was written")


def _nameless(folder: Path, size: int) -> int:
    """A new file of that size, whose blocks are there; its descriptor."""
    name = folder / f".nlscale-tier-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(name)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"tiers.folder {folder} has no room for {size:,} bytes of this rank's state; free "
                f"some, or use a larger drive"
            ) from error
        raise UserError(
            f"tiers.folder {folder} cannot be written: {error.strerror}; give a folder on a drive "
            f"of the node"
        ) from error
    return descriptor

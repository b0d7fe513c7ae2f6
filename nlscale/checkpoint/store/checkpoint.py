"""One finished checkpoint: what it holds, and whether it is whole."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from nlscale.checkpoint.store import files, manifest
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.pieces import Piece, TensorInfo
from nlscale.checkpoint.store.safe import (
    CheckpointError,
    load_metadata,
    read_pieces,
    stored_tensors,
)

METADATA = ".metadata"  # as DCP calls it
STATE = "state.json"


class Checkpoint:
    """One finished checkpoint.

    Attributes:
        path: its folder
        step: optimizer steps taken when it was saved
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    @property
    def manifest(self) -> dict[str, Any]:
        """`files`: bytes and sha256 by name; `format`, `step`, and `created`, in UTC.

        Raises:
            CheckpointError: it is missing or was altered.
        """
        path = self.path / manifest.NAME
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise CheckpointError(f"{path} is not a file")
            return manifest.parse(path, path.read_bytes())
        except OSError as error:
            raise CheckpointError(_unreadable(path, error)) from error

    @property
    def state(self) -> dict[str, Any]:
        """What was saved beside the tensors. Raises CheckpointError: missing or altered."""
        path, data = self.path / STATE, self._read_whole(STATE)
        try:
            state = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no object")
        return state

    def verify(self) -> None:
        """Read every byte and compare it with what the manifest says.

        Raises:
            CheckpointError: one line, every file that is missing, truncated, altered or unlisted.
        """
        entries = self.manifest
        if entries["step"] != self.step:
            raise CheckpointError(
                f"{self.path} is not whole: {manifest.NAME} is of step {entries['step']}"
            )
        listed = {name: Digest(**entry) for name, entry in entries["files"].items()}
        try:
            there = set(os.listdir(self.path))
        except OSError as error:
            raise CheckpointError(_unreadable(self.path, error)) from error
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found = threads.map(lambda name: _difference(self.path / name, listed[name]), listed)
            problems = [problem for problem in found if problem]
        unlisted = sorted(there - set(listed) - {manifest.NAME})
        problems += [f"{name} is not listed in {manifest.NAME}" for name in unlisted]
        if problems:
            raise CheckpointError(f"{self.path} is not whole: {'; '.join(problems)}")

    def tensors(self) -> dict[str, TensorInfo]:
        """What is stored by name; no tensor is read. Raises CheckpointError: broken metadata."""
        return {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in stored_tensors(self._metadata).items()
        }

    def read(self, pieces: list[Piece]) -> None:
        """Fill the pieces, whatever the boxes in which they were written.

        Needs no process group: every rank reads what it wants by itself. Data files are not
        verified again; see `verify`.

        Args:
            pieces: filled in place; where the dtype differs from the stored one it is converted.

        Raises:
            CheckpointError: a name is not stored or has another shape, a box is not covered by
                what is stored, or a file is missing, broken or holds anything but tensors.
        """
        read_pieces(self.path, set(self.manifest["files"]), self._metadata, pieces)

    @cached_property
    def _metadata(self) -> Metadata:
        return load_metadata(self.path / METADATA, self._read_whole(METADATA))

    def _read_whole(self, name: str) -> bytes:
        """The bytes of a small file, once they are those the manifest lists."""
        listed = self.manifest["files"].get(name)
        if listed is None:
            raise CheckpointError(f"{self.path} is not whole: {manifest.NAME} lists no {name}")
        problem = _difference(self.path / name, Digest(**listed))
        if problem:
            raise CheckpointError(f"{self.path} is not whole: {problem}")
        return (self.path / name).read_bytes()


def _difference(path: Path, listed: Digest) -> str | None:
    """What differs between a file and what the manifest lists of it; None: nothing."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path.name} is not a file"  # a pipe would be waited for, a device never ends
        size = status.st_size
        if size < listed.bytes:
            return f"{path.name} is truncated: {size} of {listed.bytes} bytes"
        if size > listed.bytes:
            return f"{path.name} has {size} bytes instead of {listed.bytes}"
        if files.digest(path) != listed:
            return f"{path.name} was altered: its sha256 differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing"
    return f"{path} cannot be read: {error.strerror}"

"""One finished checkpoint: what it holds, and whether it is whole."""

from __future__ import annotations

import json
import os
import socket
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
from nlscale.checkpoint.store.together import Ranks
from nlscale.cluster.spread import deal

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

    def verify(self, ranks: Ranks | None = None) -> None:
        """Read every byte and compare it with what the manifest says.

        Args:
            ranks: that share the reading, all of which call this; None: this process alone.

        Raises:
            CheckpointError: one line, every file that is missing, truncated, altered or unlisted;
                on every rank.
        """
        problem = self.problem(ranks or Ranks())
        if problem is not None:
            raise CheckpointError(problem)

    def problem(self, ranks: Ranks) -> str | None:
        """What is wrong with it, in one line, the same on every rank; None: it is whole.

        Raises:
            CheckpointError: it could not be found out, as a rank cannot read what the first can.
        """
        listed, unlisted, refused = ranks.first(self._listing)
        if refused is not None:
            return refused
        sizes = {name: digest.bytes for name, digest in listed.items()}
        mine = deal(sizes, ranks.size)[ranks.rank]
        found = ranks.each(lambda: self._differences({name: listed[name] for name in mine}))
        return ranks.first(lambda: self._judge(listed, unlisted, found))

    def _listing(self) -> tuple[dict[str, Digest], list[str], str | None]:
        """The files that the manifest lists, others that are there, and why not to go on, if so."""
        try:
            entries = self.manifest
            there = set(os.listdir(self.path))
        except CheckpointError as error:
            return {}, [], str(error)
        except OSError as error:
            return {}, [], _unreadable(self.path, error)
        if entries["step"] != self.step:
            of = f"{manifest.NAME} is of step {entries['step']}"
            return {}, [], f"{self.path} is not whole: {of}"
        listed = {name: Digest(**entry) for name, entry in entries["files"].items()}
        return listed, sorted(there - set(listed) - {manifest.NAME}), None

    def _differences(self, listed: dict[str, Digest]) -> dict[str, tuple[str, str]]:
        """What is wrong with which files, and for which host."""
        host = socket.gethostname()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found = threads.map(lambda name: difference(self.path / name, listed[name]), listed)
            return {
                name: (problem, host)
                for name, problem in zip(listed, found, strict=True)
                if problem
            }

    def _judge(
        self,
        listed: dict[str, Digest],
        unlisted: list[str],
        found: list[dict[str, tuple[str, str]]],
    ) -> str | None:
        """On the first rank: what the others found broken it reads itself, as their node may be."""
        own, *others = found
        problems = [problem for problem, _ in own.values()]
        for name, (problem, host) in (item for one in others for item in one.items()):
            seen = difference(self.path / name, listed[name])
            if seen is None:
                raise CheckpointError(
                    f"{self.path / name} is whole on {socket.gethostname()}, and on {host} "
                    f"{problem}: see to the file system and the memory of {host}"
                )
            problems.append(seen)
        problems += [f"{name} is not listed in {manifest.NAME}" for name in unlisted]
        return f"{self.path} is not whole: {'; '.join(problems)}" if problems else None

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
        path, wanted = self.path / name, Digest(**listed)
        problem = _misfit(path, wanted)
        if problem is None:
            try:
                data = path.read_bytes()
            except OSError as error:
                problem = _no_reading(path, error)
            else:
                if files.digest_of(data) == wanted:
                    return data
                problem = _altered(path)
        raise CheckpointError(f"{self.path} is not whole: {problem}")


def difference(path: Path, listed: Digest) -> str | None:
    """What differs between a file and what it must be; None: nothing."""
    problem = _misfit(path, listed)
    if problem is not None:
        return problem
    try:
        return None if files.digest(path) == listed else _altered(path)
    except OSError as error:
        return _no_reading(path, error)


def _misfit(path: Path, listed: Digest) -> str | None:
    """What differs before it is read."""
    try:
        status = path.stat()
    except OSError as error:
        return _no_reading(path, error)
    if not stat.S_ISREG(status.st_mode):
        return f"{path.name} is not a file"  # a pipe would be waited for, a device never ends
    if status.st_size < listed.bytes:
        return f"{path.name} is truncated: {status.st_size} of {listed.bytes} bytes"
    if status.st_size > listed.bytes:
        return f"{path.name} has {status.st_size} bytes instead of {listed.bytes}"
    return None


def _altered(path: Path) -> str:
    return f"{path.name} was altered: its sha256 differs"


def _no_reading(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path.name} is missing"
    return f"{path.name} cannot be read: {error.strerror}"


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing"
    return f"{path} cannot be read: {error.strerror}"

"""One checkpoint to a mirror, whole or not at all; and what is removed there after it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nlscale.checkpoint.mirror.remote import (
    LATEST,
    MANIFEST,
    PIECE,
    MirrorError,
    Remote,
    folder_of,
)
from nlscale.checkpoint.mirror.transfers import for_each
from nlscale.checkpoint.store import manifest
from nlscale.checkpoint.store.checkpoint import Checkpoint
from nlscale.checkpoint.store.files import Digest


class GivenUp(MirrorError):
    """The run ends, and does not wait for this copy."""


class Progress:
    """How far a copy is; counted by its threads, read and given up by another."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.began = time.monotonic()
        self.copied = 0
        self.size = 0
        """Of all its files; 0 before that is known."""
        self.given_up = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Bytes that were copied. Raises GivenUp: nobody waits for more."""
        if self.given_up:
            raise GivenUp(f"the copy of step {self.step} was given up")
        with self._lock:
            self.copied += count


def copy(
    checkpoint: Checkpoint, remote: Remote, progress: Progress, check: Callable[[], None]
) -> bool:
    """Copy a checkpoint, its manifest last; one of that step that is another is replaced.

    Every file is compared with the manifest as it is read, so that nothing broken is copied.

    Args:
        checkpoint: finished, of this run.
        remote: the mirror, which is this run's.
        progress: counted.
        check: called before what is there is given up, and before the manifest; may raise.

    Returns:
        Whether it was not there already.

    Raises:
        CheckpointError: its manifest was altered.
        MirrorError: a file is gone or altered, or the service refuses something or is gone.
    """
    text = _read(checkpoint.path / MANIFEST)
    listed = _listed(checkpoint.path / MANIFEST, text)
    name = folder_of(checkpoint.step)
    there = remote.listing().get(checkpoint.step, {})
    if MANIFEST in there:
        check()
        if remote.find(f"{name}/{MANIFEST}") == text and _differ(there, listed) is None:
            _point(remote, name)
            return False
        remote.remove(f"{name}/{MANIFEST}")
    progress.size = sum(digest.bytes for digest in listed.values())
    for one in there.keys() - listed.keys() - {MANIFEST}:
        remote.remove(f"{name}/{one}")

    def transfer(file: str) -> None:
        path, target, digest = checkpoint.path / file, f"{name}/{file}", listed[file]
        if digest.bytes <= PIECE:
            remote.write(target, b"".join(_pieces(path, digest, progress)))
        else:
            remote.upload(target, _pieces(path, digest, progress), digest.bytes)

    for_each(transfer, sorted(listed, key=lambda file: -listed[file].bytes))
    problem = _differ(remote.listing().get(checkpoint.step, {}), listed)
    if problem:
        raise MirrorError(f"{remote.url}/{name} is not what was written there: {problem}")
    progress.add(0)
    check()
    # LATEST first: named but not finished, the one before it is what counts
    _point(remote, name)
    remote.write(f"{name}/{MANIFEST}", text)
    return True


def prune(remote: Remote, last: int, keep: int, keep_every: int | None) -> None:
    """Remove what is older than the newest `keep`, counted back from the one copied last.

    What is newer was passed over by a resume, and stays until the run gets there again.

    Args:
        remote: the mirror.
        last: the step that was copied last, which is finished.
        keep: how many to keep, at least 1.
        keep_every: also keep every step that this divides.

    Raises:
        MirrorError: the service refuses; what is not removed yet stays.
    """
    listing = remote.listing()
    if MANIFEST not in listing.get(last, {}):
        raise MirrorError(f"{remote.url}/{folder_of(last)} is gone")
    older = sorted(step for step in listing if step <= last and MANIFEST in listing[step])
    kept = {*older[-keep:], *(s for s in older if keep_every is not None and s % keep_every == 0)}
    for step in sorted(step for step in listing if step <= last and step not in kept):
        remote.remove_folder(folder_of(step), listing[step])


def _point(remote: Remote, name: str) -> None:
    text = f"{name}\n".encode()
    if remote.find(LATEST) != text:
        remote.write(LATEST, text)


def _listed(path: Path, text: bytes) -> dict[str, Digest]:
    entries = manifest.parse(path, text)["files"]
    return {name: Digest(**entry) for name, entry in entries.items()}


def _differ(there: dict[str, int], listed: dict[str, Digest]) -> str | None:
    """The first file whose object is missing or of another size; None: there is none."""
    for name, digest in listed.items():
        if there.get(name) != digest.bytes:
            return f"{name} has {there.get(name, 'no')} bytes instead of {digest.bytes}"
    return None


def _pieces(path: Path, listed: Digest, progress: Progress) -> Iterator[bytes]:
    """The bytes of a file, as long as they can be those that are listed."""
    sha256, left = hashlib.sha256(), listed.bytes
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                left -= len(piece)
                sha256.update(piece)
                if left < 0 or (left == 0 and sha256.hexdigest() != listed.sha256):
                    break
                progress.add(len(piece))
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from error
    if left != 0 or sha256.hexdigest() != listed.sha256:
        raise MirrorError(f"{path} is not what its manifest lists, and was not copied")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> MirrorError:
    if isinstance(error, FileNotFoundError):
        return MirrorError(f"{path} was removed before it was copied")
    return MirrorError(f"{path} cannot be read: {error.strerror}")

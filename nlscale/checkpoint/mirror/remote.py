"""The service that holds a mirror: objects by name below one URL. No torch is imported.

    s3://bucket/runs/a/
        run.json                which run it belongs to
        LATEST                  the name of the checkpoint that was copied last
        step-00000037/
            __0_0.distcp ...    the files of the checkpoint, byte for byte
            manifest.json       written last: without it the checkpoint does not count

Whatever a service, its client or the network says is one `MirrorError` of one line. Credentials
are the client's own business: from the environment or its files, never from the URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nlscale.config.urls import wrong_with
from nlscale.data.remote.opening import ServiceError, open_service, reason
from nlscale.errors import UserError

MANIFEST = "manifest.json"
LATEST = "LATEST"
EXAMPLE = "s3://bucket/runs/a"
PIECE = 4 << 20  # bytes, as a file is read and hashed
_PART = 16 << 20  # bytes of a request; each transfer holds about two in memory
_MOST_PARTS = 9_000  # of an object; S3 takes 10,000
_STEP = re.compile(r"step-(\d{8,})")
_FOLDERS = {"file", "local", "sftp", "ssh", "smb", "hdfs"}
"""Protocols with folders, which have to be made. Object stores have none, and what makes folders
there makes buckets."""


class MirrorError(ServiceError):
    """What a mirror could not do: which URL, what and why, in one line."""


class Missing(MirrorError):
    """An object that is not there."""


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step of a folder's name; None where it is not that of a checkpoint."""
    match = _STEP.fullmatch(folder)
    return int(match[1]) if match else None


def check_url(url: str) -> None:
    """Refuse what is not a URL, and one that would put credentials into every record of a run.

    Raises:
        UserError: one line; a URL with credentials is not repeated in it.
    """
    if (wrong := wrong_with(url, f"{EXAMPLE}, or file:///mnt/other/runs/a")) is not None:
        raise UserError(f"checkpoint.mirror {wrong}")


class Remote:
    """What a service holds below a URL.

    May be used by several threads at once.

    Args:
        url: of the folder of the mirror, which need not exist; see `check_url`.

    Raises:
        UserError: not such a URL, or of a protocol that is unknown or whose package is missing.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        self._files, self._root = open_service(self.url, "checkpoint.mirror", EXAMPLE)

    def listing(self) -> dict[int, dict[str, int]]:
        """Bytes by name of the objects of every checkpoint, finished or not, by step."""
        with self._named("list"):
            self._files.invalidate_cache()
            found = self._find()
        steps: dict[int, dict[str, int]] = {}
        for path, entry in found.items():
            folder, _, name = path.removeprefix(self._root).lstrip("/").partition("/")
            step = step_of(folder)
            if step is not None and name:
                steps.setdefault(step, {})[name] = int(entry["size"] or 0)
        return steps

    def read(self, name: str) -> bytes:
        """A small object, whole. Raises MirrorError; Missing: it is not there."""
        with self._named("read", name):
            self._files.invalidate_cache()
            return bytes(self._files.cat_file(self._path(name)))

    def find(self, name: str) -> bytes | None:
        """A small object, whole; None where it is not there. Raises MirrorError."""
        try:
            return self.read(name)
        except Missing:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small object in one request: it is there whole or not at all."""
        with self._named("write", name):
            self._make_folder(name)
            self._files.pipe_file(self._path(name), data)

    def upload(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Write an object in parts. Where the pieces end with an error it is not finished.

        Args:
            name: of the object.
            pieces: its bytes.
            size: how many they are.

        Raises:
            MirrorError: the service refuses it, or is gone.
        """
        part = max(_PART, -(-size // _MOST_PARTS))
        with self._named("write", name):
            self._make_folder(name)
            file = self._files.open(self._path(name), "wb", block_size=part)
            try:
                for piece in pieces:
                    file.write(piece)
                file.close()
            except BaseException:
                _abandon(file)
                raise

    def download(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of an object in pieces, no more than `size` of them."""
        with self._named("read", name):
            self._files.invalidate_cache()
            path = self._path(name)
            with self._files.open(path, "rb", block_size=_PART, cache_type="none") as file:
                while size and (piece := file.read(min(_PART, size))):
                    size -= len(piece)
                    yield piece

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with suppress(Missing), self._named("remove", name):
            self._files.invalidate_cache()
            self._files.rm_file(self._path(name))

    def remove_folder(self, name: str, inside: Iterable[str]) -> None:
        """Remove the objects of a checkpoint, its manifest first: what is left does not count."""
        for one in sorted(inside, key=lambda one: one != MANIFEST):
            self.remove(f"{name}/{one}")
        if self._protocol in _FOLDERS:
            with suppress(Missing), self._named("remove", name):
                self._files.rmdir(self._path(name))

    def _find(self) -> dict[str, Any]:
        # All names of an object store come in one listing. To a depth, as folder after folder, what
        # cannot be listed would be left out in silence.
        if self._protocol not in _FOLDERS:
            return dict(self._files.find(self._root, detail=True))
        try:
            return dict(self._files.find(self._root, detail=True, on_error="raise"))
        except FileNotFoundError:
            return {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_folder(self, name: str) -> None:
        if self._protocol in _FOLDERS:
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _named(self, verb: str, name: str = "") -> Iterator[None]:
        """Make of whatever goes wrong an error that says what was asked of which service."""
        what = f"cannot {verb} {self.url}{'/' if name else ''}{name}"
        try:
            yield
        except UserError:
            raise  # of who reads or makes the pieces
        except FileNotFoundError as error:
            raise Missing(f"{what}: {reason(error)}") from error
        except Exception as error:  # every client has exceptions of its own
            raise MirrorError(f"{what}: {reason(error)}") from error


def _abandon(file: Any) -> None:
    """Close a file that is not whole, so that no object comes of it where a service knows that."""
    from fsspec.spec import AbstractBufferedFile

    with suppress(Exception):  # of a service that is gone; why is on its way up already
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # else it is finished when it is collected
            file.discard()
        else:
            file.close()

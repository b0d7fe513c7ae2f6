"""What every format gives: documents, and what stands in place of those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlscale.data.spans import Spans

LARGEST = 1 << 32  # bytes of a document; a compressed one can be a thousand times its file
# What nobody takes for text: it is counted, but however much there is of it, nothing is missing.
NOT_TEXT = frozenset(
    (
        *(".pyc", ".pyo", ".o", ".a", ".so", ".dylib", ".dll", ".exe", ".class", ".whl"),
        *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ico", ".tif", ".tiff", ".svg"),
        *(".mp3", ".wav", ".flac", ".ogg", ".mp4", ".mov", ".avi", ".mkv", ".webm"),
        *(".woff", ".woff2", ".ttf", ".otf", ".eot"),
        *(".pt", ".pth", ".safetensors", ".ckpt", ".onnx"),
        *(".crc", ".md5", ".sha1", ".sha256", ".sig", ".asc"),
    )
)


class SourceFile(NamedTuple):
    """A file to read: `name` is its path within the source, `size` is in bytes.

    `group` is the number of the source that it was found in. Of tokens that lie in several files it
    is the one with the ids; `size` and `mtime_ns` are of all of them.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    group: int = 0


class Tokens(NamedTuple):
    """A document that is tokens already: `ids` [count] without the separator, which follows it.

    `counted` [count + 1] says which of them count as targets, and whether the separator does; None:
    all do.
    """

    ids: NDArray
    counted: NDArray[np.bool_] | None


class Document(NamedTuple):
    """A document, or what stands in its place when it cannot be read (`error` is not empty).

    `text` and `data` are the same text as str and as UTF-8. `consumed` is about how many bytes
    of the source file it took; over a file they add up to its size. `kind` is the error in two or
    three words, the same for all documents that have it. `spans` are what counts of the text; None:
    all of it does. `tokens` are what it was made of, where that is not text. `left_out` is not None
    where nothing is lost, because what stands there is not to be read: the bytes of it that could
    be text. `lossy`: others than its tokens may have this text, because some are no whole
    characters, or no text at all.
    """

    name: str
    text: str
    data: bytes
    consumed: int
    error: str = ""
    kind: str = ""
    spans: Spans | None = None
    tokens: Tokens | None = None
    left_out: int | None = None
    lossy: bool = False

    @property
    def masked(self) -> bool:
        """Whether it says what of it counts."""
        return self.spans is not None or (
            self.tokens is not None and self.tokens.counted is not None
        )

    @property
    def empty(self) -> bool:
        """Whether there is nothing of it to learn; tokens may stand for no text and be some."""
        return not (self.data or self.lossy)

    @property
    def identity(self) -> bytes:
        """What another has that is the same but for its mask: its text, or ids that are more."""
        if self.tokens is None or not self.lossy:
            return self.data
        ids = self.tokens.ids  # no text holds 0xFF
        return b"\xff" + len(ids).to_bytes(8, "little") + ids.tobytes()


class UnreadableError(Exception):
    """A file that cannot be read, or not to its end: why, and `kind`, as that of a `Document`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def failed(name: str, consumed: int, kind: str, error: str) -> Document:
    """What stands in the place of a document that cannot be read."""
    return Document(name, "", b"", consumed, error, kind)


def left_out(name: str, consumed: int, kind: str, why: str, size: int = 0) -> Document:
    """What stands in the place of what is not to be read; `size`: bytes that could be text."""
    return Document(name, "", b"", consumed, why, kind, left_out=size)


def utf8(error: UnicodeError) -> tuple[str, str]:
    """Kind and error of a text that is not UTF-8; the error's own words would quote the text."""
    at = getattr(error, "start", 0)
    return "not UTF-8", f"not UTF-8 ({getattr(error, 'reason', 'odd')}, at {at:,})"


def too_large() -> str:
    """In words: more than a document may have."""
    return f"more than {LARGEST >> 30} GiB in one document"

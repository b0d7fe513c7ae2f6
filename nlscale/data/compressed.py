"""Compressed text as a stream of bytes: the whole of it, or an error.

The standard library's own readers take what follows a bz2 or xz stream for padding when it is
damaged, and end there without a word. Here whatever follows must be another stream.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import pyarrow

_CHUNK = 1 << 16  # bytes of a file that are read at once
_XZ_MEMORY = 1 << 30  # bytes; a file may ask for a dictionary of 4 GiB, xz -9 uses 65 MiB

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a damaged file raises."""


class _Decoder(Protocol):
    """One compressed stream, as `bz2` and `lzma` have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """One member of a gzip file; its length and CRC are checked."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Members(io.RawIOBase):
    """Streams of one format that lie one after another in `file`, with zeros behind them or not.

    Raises (on reading):
        EOFError, OSError, zlib.error, lzma.LZMAError: the file breaks off or is damaged.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], _Decoder]) -> None:
        self._file = file
        self._new = new
        self._decoder = new()
        self._pending = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self._decoder.eof or self._next():
            data = self._decoder.decompress(self._input(), len(view))
            if data:
                view[: len(data)] = data
                return len(data)
            if self._ended and not self._decoder.eof:
                raise EOFError("it breaks off")
        return 0

    def _input(self) -> bytes:
        data, self._pending = self._pending, b""
        if data or not self._decoder.needs_input:
            return data
        data = self._file.read(_CHUNK)
        self._ended = not data
        return data

    def _next(self) -> bool:
        """Begin the stream that follows, if there is one."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                return False
            rest = chunk.lstrip(b"\0")
        self._decoder, self._pending, self._ended = self._new(), rest, False
        return True


class _Zstd(io.RawIOBase):
    """Zstandard frames, one after another."""

    def __init__(self, file: BinaryIO) -> None:
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        view[: len(data)] = data
        return len(data)


def _xz() -> _Decoder:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)


_STREAMS: dict[str, Callable[[BinaryIO], io.RawIOBase]] = {
    ".gz": lambda file: _Members(file, _Gzip),
    ".bz2": lambda file: _Members(file, bz2.BZ2Decompressor),
    ".xz": lambda file: _Members(file, _xz),
    ".zst": _Zstd,
}
COMPRESSED = tuple(_STREAMS)
"""Suffixes of the formats, in lower case."""


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    """What `file`, of one of the suffixes `COMPRESSED`, holds; of any other: the file itself.

    Raises (on reading):
        one of `DAMAGE`: the file breaks off, or is not of that format.
    """
    stream = _STREAMS.get(suffix)
    return file if stream is None else io.BufferedReader(stream(file), _CHUNK)

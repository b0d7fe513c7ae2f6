"""Standard output and standard error that may break, and nothing else with them.

A terminal is closed, `head` has read enough, the disk under a log is full: what is written then
fails, in whatever happens to print, also in a thread, in C, and when the interpreter flushes at its
end. So the two streams are rebuilt over a raw file whose writes do not fail. The first error is
remembered, the file descriptor is pointed to /dev/null, and the work goes on in silence; what the
loss means is for others to say: a run notes it and goes on, a command whose output is its result
did not succeed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import Any, TextIO

_OUTPUT, _ERRORS = "stdout", "stderr"
_DESCRIPTORS = {_OUTPUT: 1, _ERRORS: 2}
_lost: dict[str, OSError] = {}
"""What ended each stream that is lost."""


def guard() -> None:
    """Let standard output and standard error break without harm; twice does no more than once.

    One that is closed already becomes /dev/null, so that no file that is opened later gets its
    descriptor, and with it what is printed. Streams that are no files, as those of a test or a
    notebook, are left alone.
    """
    for descriptor in (0, 1, 2):
        _occupy(descriptor)
    for name in _DESCRIPTORS:
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and _descriptor(stream) == _DESCRIPTORS[name]:
            setattr(sys, name, _guarded(name, stream))


def lost() -> str | None:
    """Why the screen is gone, in the words of the system, if it is: its output, else its errors."""
    found = _lost.get(_OUTPUT) or _lost.get(_ERRORS)
    return _words(found) if found else None


def lost_output() -> str | None:
    """Why a part of standard output was not written, unless its reader wanted no more of it.

    Writes what is still to be written; a file is asked whether it has reached the disk.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        _reach_disk(sys.stdout.fileno())
    found = _lost.get(_OUTPUT)
    return _words(found) if found and found.errno not in (errno.EPIPE, errno.ECONNRESET) else None


class _Raw(io.RawIOBase):
    """A file descriptor whose writes do not fail; it stays open when this is gone."""

    def __init__(self, name: str, descriptor: int) -> None:
        super().__init__()
        self._stream, self._descriptor = name, descriptor
        self.name = f"<{name}>"
        self.mode = "wb"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write all of it, as an unbuffered stream needs; into nothing once it is lost."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # whoever shares the terminal or pipe has made it so: wait for its reader
                select.select([], [self._descriptor], [])
            except OSError as error:
                _give_up(self._stream, self._descriptor, error)
                break
        return size


def _guarded(name: str, stream: io.TextIOWrapper) -> TextIO:
    """The same stream over a file that does not fail."""
    buffer: Any = stream.buffer
    if isinstance(getattr(buffer, "raw", buffer), _Raw):
        return stream
    descriptor = stream.fileno()
    try:
        stream.flush()
    except OSError as error:
        _give_up(name, descriptor, error)
        with contextlib.suppress(OSError):
            stream.flush()  # what it still holds goes nowhere, and is not tried again at the end
    raw: Any = _Raw(name, descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if hasattr(buffer, "raw") else raw,  # python -u has no buffer
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _give_up(name: str, descriptor: int, error: OSError) -> None:
    """Remember why a stream is lost, and let all that is written to it go nowhere from now on."""
    _lost.setdefault(name, error)
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, descriptor)
        if null != descriptor:
            os.close(null)


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # no file, or closed
        return None


def _reach_disk(descriptor: int) -> None:
    """A network file system, or a full one, may say only now that it has no room."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            _lost.setdefault(_OUTPUT, error)


def _words(error: OSError) -> str:
    return error.strerror or str(error)

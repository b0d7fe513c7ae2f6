"""A service that holds a data folder: reading what lies there, and asking again where it fails.

A thread of its own waits for the service, so that one which stalls is noticed whatever its client
does. What goes wrong is told apart: nothing comes, too little comes, it comes too slowly, it is not
there or not allowed, or nobody answers.
"""

from __future__ import annotations

import json
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nlscale.config.urls import Location, is_url
from nlscale.data.remote.opening import ServiceError, open_service, reason
from nlscale.data.tally import shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

KEY, EXAMPLE = "data.dir", "s3://bucket/data"
SLOWEST = 100_000
"""Bytes a second, on the average of a file, below which its transfer is given up."""
LARGEST_SMALL = 512 << 20
"""Bytes of a file that is read whole: the index of some two million shards."""
_PIECE = 4 << 20
"""Bytes that are asked for at a time; it is of these that one must come within the timeout where
the client gives no fewer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second attempt, doubled before each further one; and at most."""
_SHOWN = 40
"""Bytes that are shown of what is no JSON."""
_WAITING = 2
"""Pieces that may wait to be written."""
_T = TypeVar("_T")


class Missing(ServiceError):
    """An object that is not there."""


class Refused(ServiceError):
    """What asking again does not change: the service does not allow it, or sends without end."""


@dataclass(frozen=True)
class Patience:
    """How long a service is waited for, and how often asked."""

    timeout: float = 60.0
    """Seconds for the next byte."""
    retries: int = 4
    """Attempts after the first."""

    def pause(self, attempt: int) -> float:
        """Seconds before attempt 1, 2, ... after the first, at most."""
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1))

    def of_attempt(self, size: int) -> float:
        """Seconds after which one attempt at so many bytes is given up."""
        return self.timeout + size / SLOWEST

    def most(self, size: int) -> float:
        """Seconds after which so many bytes are there or given up."""
        pauses = sum(map(self.pause, range(1, self.retries + 1)))
        return pauses + (self.retries + 1) * self.of_attempt(size)


class Service:
    """What a service holds below a URL. May be used by several threads, and after a fork.

    Args:
        url: of a data folder; see `nlscale.config.urls.wrong_with`.
        patience: with it.

    Raises:
        UserError: a protocol that is unknown, or whose package is missing.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url.rstrip("/"), patience
        self._protocol = url.partition("://")[0]
        self._opened: tuple[int, AbstractFileSystem, str] | None = None
        self._lock = threading.Lock()
        self._open()

    def read(self, name: str) -> tuple[bytes, Any]:
        """A small file of JSON, whole, and what it says.

        What is no JSON is asked for again: a transfer can be cut without a word, and a service that
        is overloaded, or wants a login, sends a page.

        Raises:
            Missing: it is not there. Refused: it is larger than `LARGEST_SMALL`, or not allowed.
            ServiceError: the service fails, as often as it may.
        """

        def attempt() -> tuple[bytes, Any]:
            data = b"".join(self.pieces(name))
            try:
                return data, parse_json(data)
            except (ValueError, RecursionError) as error:
                begins = shown(data[:_SHOWN].decode(errors="replace"))
                size = f"{len(data):,} bytes"
                raise ServiceError(
                    f"it sends no JSON, but {size} that begin with {begins!r} ({error})"
                ) from None

        return self.again(name, attempt)

    def listing(self) -> dict[str, int] | None:
        """Bytes by name of what lies there, in one listing; None: the protocol has none."""
        if self._protocol in _LISTS_NOTHING:
            return None

        def ask() -> dict[str, int]:
            files, root = self._open()
            files.invalidate_cache()
            found = _waited_for(lambda: files.ls(root, detail=True), self.patience.timeout)
            return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in found}

        return self.again("", ask)

    def pieces(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """The bytes of a file as they come, in one attempt.

        Args:
            name: of the file.
            size: of it: more is not read; None: not known, and it is at most `LARGEST_SMALL`. The
                time is that for so many bytes, or for those that have come.

        Raises:
            Missing, Refused: at once; ServiceError: else.
        """
        began, got = time.monotonic(), 0
        with _Reading(self._open, name, _READ.get(self._protocol, {})) as reading:
            while True:
                try:
                    piece = reading.next(self.patience.timeout)
                except queue.Empty:
                    raise ServiceError(
                        f"it stalls: no byte for {self.patience.timeout:g} s after {got:,} bytes"
                    ) from None
                except Exception as error:  # every client has exceptions of its own
                    raise _named(error, got, size) from error
                if not piece:
                    break
                got += len(piece)
                yield piece
                if size is not None and got > size:
                    return
                if size is None and got > LARGEST_SMALL:
                    raise Refused(f"it sends more than the {LARGEST_SMALL:,} bytes it may have")
                limit = self.patience.of_attempt(got if size is None else size)
                if time.monotonic() - began > limit:
                    of = "" if size is None else f" of {size:,}"
                    raise ServiceError(f"it is too slow: {got:,}{of} bytes in {limit:.3g} s")
        if size is not None and got < size:
            raise ServiceError(f"it ended after {got:,} of {size:,} bytes")

    def again(self, name: str, attempt: Callable[[], _T]) -> _T:
        """What an attempt gives, made anew after a pause while it may be.

        Raises:
            Missing, Refused: at once.
            ServiceError: the last attempt has failed; says how many there were, and how long.
        """
        began, url = time.monotonic(), f"{self.url}/{name}" if name else self.url
        for number in range(self.patience.retries + 1):
            if number:  # not all nodes at the same time
                time.sleep(self.patience.pause(number) * random.uniform(0.5, 1.0))
            try:
                return attempt()
            except (Missing, Refused) as error:
                raise type(error)(f"cannot read {url}: {error}") from error
            except ServiceError as error:
                last = error
        seconds, count = time.monotonic() - began, self.patience.retries + 1
        raise type(last)(
            f"cannot read {url}: {last}; {count} attempt{'s' * (count != 1)} in {seconds:.1f} s "
            f"(data.cache.retries {self.patience.retries}, data.cache.timeout "
            f"{self.patience.timeout:g} s); see to the service, then start again"
        ) from last

    def _open(self) -> tuple[AbstractFileSystem, str]:
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():  # clients survive no fork
                # longer than who waits for it, so that one who is waited for no more ends, too
                limit = 2 * self.patience.timeout
                options = _OPTIONS[self._protocol](limit) if self._protocol in _OPTIONS else {}
                files, root = open_service(self.url, KEY, EXAMPLE, options)
                self._opened = os.getpid(), files, root
            return self._opened[1:]

    def __reduce__(self) -> tuple[type[Service], tuple[str, Patience]]:
        return Service, (self.url, self.patience)


def parse_json(data: bytes) -> Any:
    """What JSON says, of which NaN and Infinity are none. Raises ValueError, RecursionError."""
    return json.loads(data, parse_constant=_no_number)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def read_small(directory: Location, name: str, patience: Patience | None = None) -> Any:
    """What a small file of JSON says that lies in a data folder, wherever that is.

    Args:
        directory: of the data, or its URL.
        name: of the file.
        patience: with a service; None: as a run has it by default.

    Raises:
        OSError: it cannot be read, or is no file. ValueError, RecursionError: it is no JSON.
        Missing: there is none behind a URL. ServiceError: the service cannot be asked.
    """
    if is_url(directory):
        return Service(directory, patience or Patience()).read(name)[1]
    path = Path(directory) / name
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    return parse_json(path.read_bytes())


@contextmanager
def copied(url: str, needed: str, *others: str) -> Iterator[Path]:
    """Small files of JSON behind a URL in a folder that is gone afterwards.

    Args:
        url: of the data.
        needed: a file; Missing where it is not there. ServiceError: the service cannot be asked.
        others: files that may be there.
    """
    service = Service(url, Patience())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / needed).write_bytes(service.read(needed)[0])
        for name in others:
            with suppress(Missing):
                (Path(folder) / name).write_bytes(service.read(name)[0])
        yield Path(folder)


class _Reading:
    """A file that a thread reads ahead of who takes its pieces, while it is entered."""

    def __init__(
        self,
        opened: Callable[[], tuple[AbstractFileSystem, str]],
        name: str,
        options: dict[str, Any],
    ) -> None:
        self._pieces: queue.Queue[bytes | BaseException] = queue.Queue(_WAITING)
        self._left = threading.Event()

        def read() -> None:
            try:
                files, root = opened()
                options_of_all = {"block_size": _PIECE, "cache_type": "none", **options}
                with files.open(f"{root}/{name}", "rb", **options_of_all) as file:
                    while (piece := file.read(_PIECE)) and not self._left.is_set():
                        self._put(bytes(piece))
                self._put(b"")
            except BaseException as error:  # raised by who waits
                self._put(error)

        # A daemon: what waits for a service that is gone must not keep the process.
        self._thread = threading.Thread(target=read, name="data service", daemon=True)

    def __enter__(self) -> _Reading:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def next(self, seconds: float) -> bytes:
        """The next bytes, none at the end; raises queue.Empty, and what the client raised."""
        piece = self._pieces.get(timeout=seconds)
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def _put(self, piece: bytes | BaseException) -> None:
        while not self._left.is_set():
            try:
                return self._pieces.put(piece, timeout=1.0)
            except queue.Full:
                continue


def _waited_for(work: Callable[[], _T], seconds: float) -> _T:
    """What work gives, done by a thread that is waited for so long."""
    results: queue.Queue[tuple[_T | None, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, name="data service", daemon=True).start()
    try:
        found, error = results.get(timeout=seconds)
    except queue.Empty:
        raise ServiceError(f"it stalls: no answer for {seconds:g} s") from None
    if error is not None:
        raise _named(error, 0, None) from error
    return found  # type: ignore[return-value]


def _named(error: Exception, got: int, size: int | None) -> ServiceError:
    """What a client raised, as what it means."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return Missing(reason(error))
    if isinstance(error, PermissionError) or (
        isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    ):
        return Refused(f"the service refuses it: {reason(error)}")
    answered = got or (status is None and not isinstance(error, OSError))
    if answered and size is not None:
        return ServiceError(f"it broke off after {got:,} of {size:,} bytes: {reason(error)}")
    return ServiceError(reason(error))


def _http(timeout: float) -> dict[str, Any]:
    from aiohttp import ClientTimeout

    # its own limit is five minutes for a whole file
    limits = ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    return {"client_kwargs": {"timeout": limits}}


def _s3(timeout: float) -> dict[str, Any]:
    return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout}}


_PASSING = {408, 429}
"""Statuses of HTTP that say to ask again later."""
_OPTIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "http": _http,
    "https": _http,
    "s3": _s3,
    "s3a": _s3,
}
"""Of clients that have timeouts of their own, by protocol: what to open them with."""
_READ: dict[str, dict[str, Any]] = {
    # one request that streams, and no other first to learn the size
    protocol: {"block_size": 0, "size": 1}
    for protocol in ("http", "https")
}
"""How to open a file, where that is special, by protocol."""
_LISTS_NOTHING = {"http", "https"}
"""Protocols that have no listing but links on a page."""

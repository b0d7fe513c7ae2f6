"""Progress of a long pass over data: a bar in a terminal, lines that grow rarer in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[..., None]
"""Of the bytes that were done, and of how many documents they are: 1 where it is not said."""
_BAR_SECONDS = 0.2
_LINE_SECONDS = 5.0
_LINES_OF_A_TIME = 20
"""A line after 5 seconds, later after a twentieth of the time so far."""


@contextmanager
def phase(label: str, total: int, enabled: bool, what: str = "documents") -> Iterator[Advance]:
    """Show one pass over `total` bytes of `what` on standard error, when `enabled`.

    Yields a function to call once a document, with the number of bytes that it took; or, where
    several are done at a time, with how many those are as well.
    """
    if not enabled:
        yield lambda size, count=1: None
    elif sys.stderr.isatty():
        with _bar(label, total, what) as advance:
            yield advance
    else:

        def show(done: int, count: int, seconds: float) -> None:
            say(_line(label, total, done, f"{count:,} {what}", seconds))

        yield _Meter(show, _LINE_SECONDS, _LINES_OF_A_TIME)


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


class _Meter:
    """Adds up, and shows the sums only so often: documents can be many.

    Args:
        show: called with the bytes, the documents, and the seconds since the beginning.
        interval: seconds at least between two of its calls.
        share: and at least that part of the time so far, one in `share`.
    """

    def __init__(
        self, show: Callable[[int, int, float], None], interval: float, share: float = math.inf
    ) -> None:
        self._show = show
        self._interval, self._share = interval, share
        self._done = 0
        self._documents = 0
        self._started = self._shown = time.monotonic()

    def __call__(self, size: int, count: int = 1) -> None:
        self._done += size
        self._documents += count
        now = time.monotonic()
        seconds = now - self._started
        if now - self._shown >= max(self._interval, seconds / self._share):
            self._shown = now
            self._show(self._done, self._documents, seconds)


@contextmanager
def _bar(label: str, total: int, what: str) -> Iterator[Advance]:
    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn(f"{{task.fields[documents]:,}} {what}"),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, documents=0)

        def show(done: int, documents: int, seconds: float) -> None:
            bar.update(task, completed=done, documents=documents)

        yield _Meter(show, _BAR_SECONDS)


def _line(label: str, total: int, done: int, count: str, seconds: float) -> str:
    left = seconds * max(0, total - done) / max(1, done)
    return (
        f"{label}: {done / 2**20:,.1f} of {total / 2**20:,.1f} MiB, {count}, "
        f"{done / 2**20 / max(seconds, 1e-9):,.1f} MiB/s, ETA {left:,.0f} s"
    )

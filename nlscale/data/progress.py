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
"""Of the bytes that were done, and of how many documents they are: 1 where it is not said.

With `kept=True` these were done before, by an earlier attempt, and say nothing of the rate."""
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
        yield lambda size, count=1, kept=False: None
    elif sys.stderr.isatty():
        with _bar(label, total, what) as advance:
            yield advance
    else:

        def show(done: int, count: int, seconds: float, kept: int) -> None:
            say(_line(label, total, done, f"{count:,} {what}", seconds, kept))

        yield _Meter(show, _LINE_SECONDS, _LINES_OF_A_TIME)


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


class _Meter:
    """Adds up, and shows the sums only so often: documents can be many.

    Args:
        show: called with the bytes, the documents, the seconds since the beginning, and how many
            of the bytes were done before that.
        interval: seconds at least between two of its calls.
        share: and at least that part of the time so far, one in `share`.
    """

    def __init__(
        self, show: Callable[[int, int, float, int], None], interval: float, share: float = math.inf
    ) -> None:
        self._show = show
        self._interval, self._share = interval, share
        self._done = self._kept = 0
        self._documents = 0
        self._started = self._shown = time.monotonic()

    def __call__(self, size: int, count: int = 1, kept: bool = False) -> None:
        self._done += size
        self._kept += size if kept else 0
        self._documents += count
        now = time.monotonic()
        seconds = now - self._started
        if now - self._shown >= max(self._interval, seconds / self._share):
            self._shown = now
            self._show(self._done, self._documents, seconds, self._kept)


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

        def show(done: int, documents: int, seconds: float, kept: int) -> None:
            bar.update(task, completed=done, documents=documents)

        yield _Meter(show, _BAR_SECONDS)


def _line(label: str, total: int, done: int, count: str, seconds: float, kept: int) -> str:
    left = seconds * max(0, total - done) / max(1, done - kept)
    return (
        f"{label}: {done / 2**20:,.1f} of {total / 2**20:,.1f} MiB, {count}, "
        f"{(done - kept) / 2**20 / max(seconds, 1e-9):,.1f} MiB/s, ETA {left:,.0f} s"
    )

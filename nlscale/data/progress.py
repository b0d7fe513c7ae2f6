"""Progress of a long pass over text: a bar in a terminal, a line every few seconds in a log."""

from __future__ import annotations

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

Advance = Callable[[int], None]
_BAR_SECONDS = 0.2
_LINE_SECONDS = 5.0


@contextmanager
def phase(label: str, total: int, enabled: bool) -> Iterator[Advance]:
    """Show one pass over `total` bytes on standard error, when `enabled`.

    Yields a function to call once a document, with the number of bytes that it took.
    """
    if not enabled:
        yield lambda size: None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:

        def show(done: int, documents: int, seconds: float) -> None:
            say(_line(label, total, done, documents, seconds))

        yield _Meter(show, _LINE_SECONDS)


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


class _Meter:
    """Adds up, and shows the sums only every `interval` seconds: documents can be many."""

    def __init__(self, show: Callable[[int, int, float], None], interval: float) -> None:
        self._show = show
        self._interval = interval
        self._done = 0
        self._documents = 0
        self._started = self._shown = time.monotonic()

    def __call__(self, size: int) -> None:
        self._done += size
        self._documents += 1
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._show(self._done, self._documents, now - self._started)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[documents]:,} documents"),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, documents=0)

        def show(done: int, documents: int, seconds: float) -> None:
            bar.update(task, completed=done, documents=documents)

        yield _Meter(show, _BAR_SECONDS)


def _line(label: str, total: int, done: int, documents: int, seconds: float) -> str:
    left = seconds * max(0, total - done) / max(1, done)
    return (
        f"{label}: {done / 2**20:,.1f} of {total / 2**20:,.1f} MiB, {documents:,} documents, "
        f"{done / 2**20 / max(seconds, 1e-9):,.1f} MiB/s, ETA {left:,.0f} s"
    )

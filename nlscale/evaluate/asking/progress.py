"""How far an evaluation is: a bar in a terminal, lines that grow rarer elsewhere, with an estimate.

All of it on standard error: standard output is the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from nlscale.config.units import human_count
from nlscale.telemetry.terminal import duration

_BAR_SECONDS = 0.2
_LINE_SECONDS = 5.0
_LINES_OF_A_TIME = 10
"""A line after 5 seconds, later after a tenth of the time so far."""


class Progress:
    """Of one evaluation.

    Args:
        label: what is done.
        shown: whether anything is said.
    """

    def __init__(self, label: str, shown: bool) -> None:
        self._label, self._shown = label, shown

    def say(self, line: str) -> None:
        """Print a line."""
        if self._shown:
            print(f"{self._label}: {line}", file=sys.stderr, flush=True)

    @contextmanager
    def phase(self, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        """Show work of `total` units; yields a function to call with how many more are done."""
        if not self._shown or not total:
            yield lambda done: None
        elif sys.stderr.isatty():
            with _bar(self._label, total, unit) as show:
                yield _Meter(show, _BAR_SECONDS, 0.0)
        else:
            yield _Meter(
                lambda done, seconds: self.say(_line(done, total, unit, seconds)),
                _LINE_SECONDS,
                1 / _LINES_OF_A_TIME,
            )


class _Meter:
    """Adds up, and shows the sum only so often."""

    def __init__(self, show: Callable[[float, float], None], interval: float, share: float) -> None:
        self._show, self._interval, self._share = show, interval, share
        self._done = 0.0
        self._started = self._shown = time.monotonic()

    def __call__(self, done: float) -> None:
        self._done += done
        now = time.monotonic()
        seconds = now - self._started
        if now - self._shown >= max(self._interval, self._share * seconds):
            self._shown = now
            self._show(self._done, seconds)


@contextmanager
def _bar(label: str, total: float, unit: str) -> Iterator[Callable[[float, float], None]]:
    columns = (
        TextColumn(label),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rest]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, rest="")

        def show(done: float, seconds: float) -> None:
            bar.update(task, completed=min(done, total), rest=_rest(done, total, unit, seconds))

        yield show


def _line(done: float, total: float, unit: str, seconds: float) -> str:
    share = min(1.0, done / total)
    return (
        f"{human_count(min(done, total))} of {human_count(total)} {unit}, {share:.0%}, "
        f"{_rest(done, total, unit, seconds)}"
    )


def _rest(done: float, total: float, unit: str, seconds: float) -> str:
    rate = human_count(done / max(seconds, 1e-9))
    left = seconds * max(0.0, total - done) / max(done, 1e-9)
    return f"{rate} {unit}/s, about {duration(left)} left"

"""Being asked to stop: what a signal of the scheduler, a lost terminal, or Ctrl-C, does.

A rank that is told so while it trains only notes it. The wish rides on the consensus of the next
step, so that all ranks stop after the same step, save, and end; a rank that is not told stops with
the others. Before training, there is nothing to save, and a rank that is told ends at once.

SIGHUP, of a terminal that goes, asks like the others, unless it is ignored when the process starts,
as under nohup: then it stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from nlscale.cluster.life.place import place
from nlscale.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Of Slurm (time limit, preemption, `--signal`), torchrun, and a person at the keyboard."""
_ONE_KEY_SECONDS = 1.0
Handler = Callable[[int, FrameType | None], Any]


def with_hangup(numbers: tuple[signal.Signals, ...]) -> tuple[signal.Signals, ...]:
    """These signals, and SIGHUP unless this process was started to ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return numbers if ignored else (*numbers, signal.SIGHUP)


@contextmanager
def handled(numbers: tuple[signal.Signals, ...], handler: Handler) -> Iterator[None]:
    """Call `handler` for these signals in the body.

    Python delivers signals to the main thread only; in another one nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def ends_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless it is ignored, end the body as Ctrl-C does.

    What it has made for itself, such as temporary folders and processes, goes on the way out.
    """
    with handled(with_hangup((signal.SIGTERM,)), _interrupt):
        yield


class StopSignals:
    """Notes signals while it is entered; a second Ctrl-C ends the process at once.

    Until `training` is called a signal raises `Stopped`.

    Python delivers signals to the main thread only; elsewhere nothing is noted.

    Raises:
        UserError: see `nlscale.cluster.life.place.place`.
    """

    def __init__(self) -> None:
        self.since = time.time()
        """Unix time from which on signals are noted, about when the process began."""
        self.name: str | None = None
        """Of the first signal that came."""
        self._training = False
        self._came_at = 0.0
        self._speaks = place().rank == 0
        self._ends = contextlib.ExitStack()

    @property
    def came(self) -> bool:
        """Whether this process was told to stop."""
        return self.name is not None

    def training(self) -> None:
        """From now on signals are noted, for the next step to heed."""
        self._training = True

    def __enter__(self) -> StopSignals:
        self._ends.enter_context(handled(with_hangup(SIGNALS), self._note))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.name == "SIGINT":
            # one Ctrl-C may arrive twice: from the terminal, and handed on by torchrun
            if now - self._came_at > _ONE_KEY_SECONDS:
                raise KeyboardInterrupt
        elif self.name is None:
            self.name, self._came_at = signal.Signals(number).name, now
            if not self._training:
                raise Stopped(f"stopped before the first step ({self.name})")
            if self._speaks:
                again = "; Ctrl-C again: now" if number == signal.SIGINT else ""
                line = f"nlscale: {self.name}: stopping after this step{again}\n"
                # not print: the signal may have come in the middle of one. The terminal may be gone
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""Being asked to stop: what a signal of the scheduler, or Ctrl-C, does to a run.

A rank that is told so while it trains only notes it. The wish rides on the consensus of the next
step, so that all ranks stop after the same step, save, and end; a rank that is not told stops with
the others. Before training, there is nothing to save, and a rank that is told ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from nlscale.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Of Slurm (time limit, preemption, `--signal`), torchrun, and a person at the keyboard."""
_ONE_KEY_SECONDS = 1.0


class StopSignals:
    """Notes signals while it is entered; a second Ctrl-C ends the process at once.

    Until `training` is called a signal raises `Stopped`.

    Python delivers signals to the main thread only; elsewhere nothing is noted.
    """

    def __init__(self) -> None:
        self.since = time.time()
        """Unix time from which on signals are noted, about when the process began."""
        self.name: str | None = None
        """Of the first signal that came."""
        self._training = False
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    @property
    def came(self) -> bool:
        """Whether this process was told to stop."""
        return self.name is not None

    def training(self) -> None:
        """From now on signals are noted, for the next step to heed."""
        self._training = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
            if os.environ.get("RANK", "0") == "0":
                again = "; Ctrl-C again: now" if number == signal.SIGINT else ""
                # not print: the signal may have come in the middle of one
                os.write(2, f"nlscale: {self.name}: stopping after this step{again}\n".encode())

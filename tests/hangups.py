"""Terminals that go, and processes that hear of it or were started to ignore it."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time


def hears_hangups() -> None:
    """In a process that begins: SIGHUP ends it, however the tests themselves were started."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ignores_hangups() -> None:
    """In a process that begins: as nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Terminal:
    """A terminal that is watched until it is closed."""

    def __init__(self) -> None:
        self._watched, self._end = os.openpty()
        self.path = os.ttyname(self._end)
        """Of the end that programs use."""
        self.shown = b""
        self._close = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def wait_for(self, text: bytes, seconds: float = 60.0) -> None:
        """Until it shows that: a display is drawn a few times a second."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < until, self.shown
            time.sleep(0.02)

    def close(self) -> None:
        """As when its window is closed, or the connection to it is lost; twice does no harm."""
        self._close.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._close.is_set():
            if select.select([self._watched], [], [], 0.02)[0]:
                self.shown += os.read(self._watched, 1 << 16)
        os.close(self._end)
        os.close(self._watched)


def in_terminal(path: str, ignoring: bool) -> None:
    """In a process that begins: make that terminal its own."""
    (ignores_hangups if ignoring else hears_hangups)()
    os.setsid()
    onto(path)
    os.environ["TERM"] = "xterm"


def onto(path: str) -> None:
    """In a process that begins: write to that file, pipe or terminal."""
    file = os.open(path, os.O_RDWR if path.startswith("/dev/pts") else os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]

"""Fetching shards that will be needed, beside whoever reads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from nlscale.data.index import Shard
from nlscale.errors import UserError


class Ahead:
    """A few threads that fetch what is wanted next.

    A shard that they cannot fetch is left to who reads it, and who then says why.

    Args:
        threads: shards that are fetched at once.
        fetch: one of them.
    """

    def __init__(self, threads: int, fetch: Callable[[Shard], None]) -> None:
        self._threads, self._fetch = threads, fetch
        self._changed = threading.Condition()
        self._wanted: deque[Shard] = deque()
        self._busy: set[str] = set()
        self._started: int | None = None
        """The process whose threads there are: they survive no fork."""

    def want(self, shards: Sequence[Shard]) -> None:
        """Fetch these, the first first, and no longer what was wanted before."""
        if self._started != os.getpid():
            self._start()
        with self._changed:
            self._wanted = deque(shard for shard in shards if shard["name"] not in self._busy)
            self._changed.notify_all()

    def wait(self) -> None:
        """Until nothing is wanted that is not fetched, or left to who reads it."""
        with self._changed:
            while self._wanted or self._busy:
                self._changed.wait()

    def _start(self) -> None:
        self._changed, self._busy = threading.Condition(), set()
        self._started = os.getpid()
        for _ in range(self._threads):
            threading.Thread(target=self._run, name="read ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard = self._wanted.popleft()
                self._busy.add(shard["name"])
            try:
                with suppress(UserError):
                    self._fetch(shard)
            finally:
                with self._changed:
                    self._busy.discard(shard["name"])
                    self._changed.notify_all()

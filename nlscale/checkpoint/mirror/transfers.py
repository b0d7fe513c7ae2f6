"""Several files at once, by daemon threads: a transfer that hangs keeps no process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
THREADS = 4
"""At once: one connection seldom fills a link, and each takes some 32 MiB of host memory."""


def for_each(work: Callable[[T], None], items: Sequence[T]) -> None:
    """Call `work` for all items, in their order as threads become free.

    After the first error no further item is begun; it is raised when those under way have ended.
    """
    left, errors, lock = list(reversed(items)), list[BaseException](), threading.Lock()

    def serve() -> None:
        while True:
            with lock:
                if errors or not left:
                    return
                item = left.pop()
            try:
                work(item)
            except BaseException as error:  # raised by the thread that waits
                with lock:
                    errors.append(error)
                return

    threads = [
        threading.Thread(target=serve, name="mirror transfer", daemon=True)
        for _ in range(min(THREADS, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

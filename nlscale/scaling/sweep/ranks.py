"""A run of a sweep that has several ranks: a process each, forked, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

from nlscale.cluster.life.signals import handled
from nlscale.errors import LostRank, Stopped
from nlscale.train.processes import OTHERS_SECONDS, as_rank, world

_POLL_SECONDS = 0.5


def ranks_of(count: int, work: Callable[[], None]) -> int:
    """Do that as each rank of so many, in a process of its own that has a rank's environment.

    SIGTERM is handed on. A rank that is lost ends the others, which have noticed that themselves or
    are killed.

    Returns:
        Exit code 0, or that of the first that failed.
    """
    context = multiprocessing.get_context("fork")
    shared = world(count)
    processes = [
        context.Process(target=_rank, args=(as_rank(shared, rank), work)) for rank in range(count)
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                process.terminate()

    for process in processes:
        process.start()
    with handled((signal.SIGTERM,), hand_on):
        return _first_failure(processes)


def _rank(environment: dict[str, str], work: Callable[[], None]) -> None:
    os.environ.update(environment)
    work()


def _first_failure(processes: Sequence[BaseProcess]) -> int:
    code, kill_at = 0, float("inf")
    alive = dict(enumerate(processes))
    while alive:
        wait([process.sentinel for process in alive.values()], _POLL_SECONDS)
        for rank, process in list(alive.items()):
            if process.exitcode is None:
                continue
            process.join()
            del alive[rank]
            failed = process.exitcode not in (0, Stopped.exit_code)
            if failed:
                kill_at = min(kill_at, time.monotonic() + OTHERS_SECONDS)
            if code in (0, Stopped.exit_code) and process.exitcode:
                code = process.exitcode if failed or not code else code
                if code < 0:
                    name = signal.Signals(-code).name
                    print(f"nlscale: rank {rank} was killed by {name}", file=sys.stderr)
                    code = LostRank.exit_code
        if time.monotonic() > kill_at:
            for process in alive.values():
                process.kill()
    return code

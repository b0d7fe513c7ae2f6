"""Ports on which the tests' worlds meet, although many of them begin at the same time.

A port that the kernel gives away can be given to a connection of another world before it is used.
These lie below the kernel's, each worker of pytest-xdist has a range of its own, and none is given
twice before all have been.
"""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _EACH = 21_000, 1_400  # the jobs of the tests' Slurm meet below, at 20,000 and their number
_WORKERS = 8
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
# Two sessions on one machine are not likely to begin at the same place.
_next = itertools.count(os.getpid())


def free_port() -> int:
    """A port of this worker's at which nothing listens."""
    for number in itertools.islice(_next, _EACH):
        port = _FIRST + _worker * _EACH + number % _EACH
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port is free among {_EACH}")

"""How long each rank computes, before it waits for the others: who holds them all up."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nlscale.ops.moments import Moment, now, seconds_between
from nlscale.parallel.layout import Layout

_SLOW = 1.2
"""Times the median, from which a rank is called slow."""
_REMEMBERED = 200
"""Steps."""


class BusyTime:
    """Seconds from the start of a step until this rank waits for all others; on a GPU, its own.

    Ranks of one tensor or pipeline group wait for each other inside the passes, so a slow one shows
    in all of its group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Moment | None = None
        # Bounded for runs that never compare.
        self._spans: deque[tuple[Moment, Moment]] = deque(maxlen=_REMEMBERED)

    def start(self) -> None:
        """A step begins, with reading its data."""
        self._began = now(self._device)

    def stop(self) -> None:
        """Its backward pass is over (on a GPU: under way)."""
        if self._began is not None:
            self._spans.append((self._began, now(self._device)))
            self._began = None

    def take(self) -> float:
        """Median seconds of the last steps since the last call, all of them over. 0: none."""
        seconds = [seconds_between(*span) for span in self._spans]
        self._spans.clear()
        return statistics.median(seconds) if seconds else 0.0


@dataclass(frozen=True)
class Spread:
    """Busy seconds of a step over the ranks."""

    fastest: float
    median: float
    slowest: float
    slowest_rank: int
    slowest_host: str

    @property
    def warning(self) -> str | None:
        """A line on a rank that holds the others up; None where none does."""
        if self.slowest < _SLOW * self.median or self.median == 0:
            return None
        return (
            f"rank {self.slowest_rank} on {self.slowest_host} is slow: it computes "
            f"{self.slowest:.3g} s a step, the median rank {self.median:.3g} s, and all wait for "
            f"it; look at that host's clocks, disk and other processes (nlscale doctor)"
        )


def compare(layout: Layout, seconds: float) -> Spread:
    """Bring the busy seconds of all ranks together; the same on every rank."""
    all_of_them = torch.zeros(layout.world, dtype=torch.float64, device=layout.device)
    all_of_them[layout.rank] = seconds
    dist.all_reduce(all_of_them)
    by_rank = all_of_them.tolist()
    slowest = max(range(layout.world), key=by_rank.__getitem__)
    return Spread(
        fastest=min(by_rank),
        median=statistics.median_low(by_rank),
        slowest=by_rank[slowest],
        slowest_rank=slowest,
        slowest_host=layout.hosts[slowest],
    )

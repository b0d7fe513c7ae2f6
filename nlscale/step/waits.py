"""For what the device waits in a step, instead of computing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nlscale.ops.moments import Moment, now, seconds_between


@dataclass(frozen=True)
class Waits:
    """Seconds of one step and one rank in which what computes had nothing to do."""

    data: float = 0.0
    """While the next batch was read."""
    link: float = 0.0
    """For reductions across nodes, those that the backward pass did not hide."""
    host: float = 0.0
    """While the host did anything else between two steps: records, checks, the next launch."""


class WaitClock:
    """Tells apart what happens from the end of a step to the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: Moment | None = None
        self._began: Moment | None = None
        self._reading = 0.0

    def free(self) -> None:
        """From here on the device has nothing to do, once it has done what it was asked for."""
        self._free, self._reading = now(self._device), 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading the next batch."""
        started = time.monotonic()
        yield
        self._reading += time.monotonic() - started

    def begin(self) -> None:
        """The device is asked for a step."""
        self._began = now(self._device)

    def end(self, link: float) -> Waits:
        """All of the step is over, or under way; `link` seconds of it were waiting for nodes."""
        idle = 0.0
        if self._free is not None and self._began is not None:
            idle = seconds_between(self._free, self._began)
        data = min(idle, self._reading)
        self.free()
        return Waits(data, link, idle - data)

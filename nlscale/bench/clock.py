"""How long something takes on a device, and what the device could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nlscale.ops import moments

_WARM_UP = 3


def here() -> torch.device:
    """The GPU, where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


CPU = torch.device("cpu")


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def now(device: torch.device) -> float:
    """Seconds, after everything on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(
    device: torch.device,
    repeats: int,
    run: Callable[[Any], Any],
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Of run(prepare()), warm; what `prepare` takes does not count.

    On a GPU by its own clock, while the host is ahead of it, so that launches are hidden as they
    are in training: nothing waits between one time and the next.
    """
    marks: list[tuple[moments.Moment, moments.Moment]] = []
    for _ in range(_WARM_UP + repeats):
        given = prepare()
        began = moments.now(device)
        run(given)
        marks.append((began, moments.now(device)))
        del given
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(moments.seconds_between(*mark) for mark in marks[_WARM_UP:])


@dataclass(frozen=True)
class Ceilings:
    """Measured, not taken from a data sheet."""

    flops_per_second: float
    """Of a large matrix product."""
    bytes_per_second: float
    """Read and written by a copy."""


def ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """Of one device: a square product of 8192, a copy of 2 GiB; small or on a CPU 512, 64 MiB."""
    large = device.type == "cuda" and not small
    size, count = (8192, 2**30) if large else (512, 2**25)
    x = torch.randn(size, size, device=device, dtype=dtype)
    product = median_seconds(device, 10, lambda _: x @ x)
    source = torch.empty(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_seconds(device, 10, lambda _: target.copy_(source))
    return Ceilings(2 * size**3 / product, 2 * source.nbytes / copy)

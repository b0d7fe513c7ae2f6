"""A torch profiler trace of some steps, and what they cost most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 2
"""That are traced."""
_SHOWN = 5


def trace(step: Callable[[], Any], path: Path | None) -> list[dict[str, Any]]:
    """Take some steps under the profiler; write a trace that chrome://tracing and Perfetto read.

    Args:
        step: takes one.
        path: of the trace; None: none is written.

    Returns:
        The five largest costs, by time spent in a kernel, or on a CPU in an operation itself:
        `name`, `milliseconds` a step, `calls` a step, and `share` of all.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    return largest_costs(profiler.key_averages(), on_gpu)


def largest_costs(events: Iterable[Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Of the events of `STEPS` steps, as `trace` returns them."""
    if on_gpu:
        # The profiler counts a kernel's time for the operation that launched it, too.
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        costs = [(e.self_device_time_total, e) for e in kernels if not e.is_user_annotation]
    else:
        costs = [(e.self_cpu_time_total, e) for e in events]
    total = sum(cost for cost, _ in costs)
    costs.sort(key=lambda cost: -cost[0])
    return [
        {
            "name": event.key,
            "milliseconds": cost / 1e3 / STEPS,
            "calls": event.count / STEPS,
            "share": cost / total,
        }
        for cost, event in costs[:_SHOWN]
    ]

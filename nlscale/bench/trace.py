"""A torch profiler trace of some steps, and what they cost most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
        The five largest costs, by time spent in the operation or kernel itself: `name`,
        `milliseconds` a step, `calls` a step, and `share` of all.
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
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    costs = [(getattr(event, by), event) for event in profiler.key_averages()]
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

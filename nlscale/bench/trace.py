"""A torch profiler trace of some steps: what they cost most, and what the host waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 2
"""That are traced."""
_SHOWN = 5
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the host does nothing but wait for the device."""
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def trace(step: Callable[[], Any], path: Path | None) -> dict[str, Any]:
    """Take some steps under the profiler; write a trace that chrome://tracing and Perfetto read.

    Args:
        step: takes one.
        path: of the trace; None: none is written.

    Returns:
        As `account_of`.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    return account_of(profiler.key_averages(), on_gpu)


def account_of(events: Sequence[Any], on_gpu: bool) -> dict[str, Any]:
    """What some steps did, from the profiler's averages of `STEPS` steps; all by the step.

    Returns:
        `largest_costs`, as `largest_costs` has them; `busy_ms`, of all kernels or operations.
        On a GPU, else null: `host_waits`, calls in which the host waits for it; `launches` of
        kernels; `pageable_copies`, copies between it and memory that is not pinned, which wait too.
    """
    on_host: dict[str, Any] = dict.fromkeys(("host_waits", "launches", "pageable_copies"))
    if on_gpu:
        # the last wait is the profiler's own
        waits = sum(e.count for e in events if e.key in _WAITS) - 1
        on_host["host_waits"] = max(0, waits) / STEPS
        on_host["launches"] = sum(e.count for e in events if e.key in _LAUNCHES) / STEPS
        pageable = sum(e.count for e in events if "Memcpy" in e.key and "Pageable" in e.key)
        on_host["pageable_copies"] = pageable / STEPS
    costs = _costs(events, on_gpu)
    busy = sum(cost for cost, _ in costs) / 1e3 / STEPS
    return {"largest_costs": largest_costs(events, on_gpu), "busy_ms": busy, **on_host}


def largest_costs(events: Iterable[Any], on_gpu: bool) -> list[dict[str, Any]]:
    """The five largest, by time spent in a kernel, or on a CPU in an operation itself.

    Returns:
        Of each `name`, `milliseconds` a step, `calls` a step, and `share` of all.
    """
    costs = _costs(events, on_gpu)
    total = sum(cost for cost, _ in costs)
    return [
        {
            "name": event.key,
            "milliseconds": cost / 1e3 / STEPS,
            "calls": event.count / STEPS,
            "share": cost / total,
        }
        for cost, event in costs[:_SHOWN]
    ]


def _costs(events: Iterable[Any], on_gpu: bool) -> list[tuple[float, Any]]:
    """Microseconds of all steps and the event they are of, the largest first."""
    if on_gpu:
        # The profiler counts a kernel's time for the operation that launched it, too.
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        costs = [(e.self_device_time_total, e) for e in kernels if not e.is_user_annotation]
    else:
        costs = [(e.self_cpu_time_total, e) for e in events]
    return sorted(costs, key=lambda cost: -cost[0])

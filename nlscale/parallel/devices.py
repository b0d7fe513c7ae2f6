"""What a rank's device can do, and how much of its memory has been used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from nlscale.config.vocabulary import Dtype, ParallelConfig
from nlscale.parallel.layout import Layout

_DENSE_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B100": 1750.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "A40": 150.0,
    "MI300X": 1307.0,
    "MI250X": 191.0,
}
"""By a part of the name that the driver gives a GPU, the makers' figures, without sparsity; of an
MI250X those of one of its two devices."""


def peak_flops(device: torch.device, dtype: Dtype) -> float | None:
    """Most FLOPs a second that a GPU of this kind can do in bf16; None where that is not known.

    Not known: another GPU, a part of one, a CPU, and fp32, whose products run in several ways.
    """
    if device.type != "cuda" or dtype != Dtype.bf16:
        return None
    name = torch.cuda.get_device_name(device)
    found = [kind for kind in _DENSE_BF16_TFLOPS if re.search(rf"\b{kind}\b", name)]
    if not found or "MIG" in name:
        return None
    return 1e12 * _DENSE_BF16_TFLOPS[max(found, key=len)]


def queue_warnings(parallel: ParallelConfig, layout: Layout) -> list[str]:
    """A line where an environment lets reductions across nodes hold up what computes."""
    one = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    if not (one and parallel.overlap and layout.nodes > 1 and layout.device.type == "cuda"):
        return []
    return [
        "CUDA_DEVICE_MAX_CONNECTIONS=1 gives a GPU one queue: a reduction across nodes that waits "
        "for its turn holds up what computes, and hides nothing; leave the variable unset, or set "
        "parallel.overlap=false"
    ]


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far, on its GPU; where it has none, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not what getrusage says, which begins with what the process that started this one held.
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(kilobytes[1]) * 1024 if kilobytes else 0

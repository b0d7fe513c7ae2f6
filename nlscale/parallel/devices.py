"""What a rank's device can do, and how much of its memory has been used."""

from __future__ import annotations

import resource

import torch

from nlscale.config.vocabulary import Dtype

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

    Not known: another GPU, a CPU, and fp32, whose products run in one of several ways.
    """
    if device.type != "cuda" or dtype != Dtype.bf16:
        return None
    name = torch.cuda.get_device_name(device)
    found = [kind for kind in _DENSE_BF16_TFLOPS if kind in name]
    return 1e12 * _DENSE_BF16_TFLOPS[max(found, key=len)] if found else None


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far, on its GPU; where it has none, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux

"""Between host and GPU, without one waiting for the other.

A plain copy makes the host wait until the GPU has done all that was asked of it before, and then
the GPU waits until the host has found the next thing to ask. On a CPU there is nothing to copy.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor there; the copy is under way when this returns."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way to the host, which waits for it only when it reads it."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach()
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Any]:
        """Its numbers, nested as the tensor is, as soon as the GPU has come that far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()

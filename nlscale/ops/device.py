"""Where kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


_assumed: list[int] = []


def generation(x: Tensor) -> int:
    """The major compute capability of the NVIDIA GPU that a tensor is on, such as 9; else 0."""
    if _assumed:
        return _assumed[-1]
    nvidia = x.is_cuda and torch.version.hip is None
    return torch.cuda.get_device_capability(x.device)[0] if nvidia else 0


@contextmanager
def assuming(major: int) -> Iterator[None]:
    """Inside, all tensors are on a GPU of that generation: what is launched there is asked for."""
    _assumed.append(major)
    try:
        yield
    finally:
        _assumed.pop()

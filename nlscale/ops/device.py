"""Where kernels run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

"""Small operations on a CPU run on one thread: waking the others costs more than they save."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor


def on_one_thread(function: Any) -> Any:
    """Decorates forward or backward of an autograd function whose tensors are small.

    Where its tensors are on the CPU it runs on one intra-op thread; elsewhere nothing changes.
    """

    @wraps(function)
    def on_one(ctx: Any, *args: Any) -> Any:
        threads = torch.get_num_threads()
        on_cpu = all(x.device.type == "cpu" for x in args if isinstance(x, Tensor))
        if threads == 1 or not on_cpu:
            return function(ctx, *args)
        torch.set_num_threads(1)
        try:
            return function(ctx, *args)
        finally:
            torch.set_num_threads(threads)

    return on_one

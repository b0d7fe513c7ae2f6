"""Bytes of all tensors that are alive, as a GPU's allocator would see them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all storages made since, while something holds them."""

    now = peak = 0

    def __init__(self, others: list[Any]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if size and key not in self.known:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

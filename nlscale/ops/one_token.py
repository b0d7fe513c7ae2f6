"""The small operations around the large ones, of one token a row and without a derivative.

What they cost on a CPU is how many they are, and a number of Python's costs as much as one more.
All is computed in at least fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.ops.memory.rules import NORMALIZE_EPS


class Norm:
    """x / sqrt(|x|^2 + eps) along the last dimension."""

    def __init__(self, eps: float, dtype: torch.dtype) -> None:
        self.dtype, self.root = dtype, torch.tensor(eps**0.5, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.root)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) along the last dimension, times a weight where there is one."""

    def __init__(self, size: int, eps: float, weight: Tensor | None, dtype: torch.dtype) -> None:
        """Args are of the last dimension, and the dtype to compute in."""
        super().__init__(size * eps, dtype)
        scale = torch.tensor(size**0.5, dtype=dtype)
        self.scale = scale if weight is None else weight.to(dtype) * scale

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).mul_(self.scale)


def unit(dtype: torch.dtype) -> Norm:
    """As `nlscale.ops.pointwise.normalize`."""
    return Norm(NORMALIZE_EPS, dtype)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up of [gate | up], the halves of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

"""Initial weights: a pure function of the seed and the parameter's name.

Each parameter carries how it is initialised and how it is split. Its full tensor is drawn from a
generator seeded by the run's seed and its name, and the rank keeps its part, so that the same
seed gives the same model on every layout of tensor and pipeline ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Initializer = Callable[[Tensor, torch.Generator], None]
"""Fills a full fp32 tensor in place."""


def tag(
    parameter: nn.Parameter,
    init: Initializer,
    partition_dim: int | None = None,
    sections: int = 1,
) -> None:
    """Say how a parameter is initialised and split over the tensor-parallel group.

    Args:
        parameter: this rank's part.
        init: fills the full tensor.
        partition_dim: the dimension that is split; None where every rank holds all of it.
        sections: equal parts stacked along that dimension, each split by itself.
    """
    carrier: Any = parameter
    carrier.initializer = init
    # the names under which megatron-core looks for the same
    carrier.tensor_model_parallel = partition_dim is not None
    carrier.partition_dim = -1 if partition_dim is None else partition_dim
    carrier.partition_stride = sections


def initialize(model: nn.Module, seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Set every parameter of the model in place."""
    with torch.no_grad():
        parameter: Any
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(_seed(seed, name))
            dim, sections = parameter.partition_dim, parameter.partition_stride
            shape = list(parameter.shape)
            if dim >= 0:
                shape[dim] *= tensor_size
            full = torch.empty(shape)
            parameter.initializer(full, generator)
            if dim >= 0 and tensor_size > 1:
                parts = [
                    section.chunk(tensor_size, dim)[tensor_rank]
                    for section in full.chunk(sections, dim)
                ]
                full = torch.cat(parts, dim)
            parameter.copy_(full)


def normal(std: float) -> Initializer:
    """Independent normal entries."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def constant(value: float) -> Initializer:
    """One value everywhere."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


ones = constant(1.0)


def orthogonal(tensor: Tensor, generator: torch.Generator) -> None:
    """An orthogonal matrix for each head, [heads, d, d]."""
    for head in tensor:
        nn.init.orthogonal_(head, generator=generator)


def spread(middle: float, width: float) -> Initializer:
    """Equally spaced values over the heads, [heads]: memories of different reach."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(middle + width * torch.linspace(-1, 1, len(tensor)))

    return fill


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1

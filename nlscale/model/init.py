"""Initial weights: a pure function of the seed and the parameter's name.

Each parameter carries how it is initialised and how it is split. Its full tensor is drawn from a
generator seeded by the run's seed and its name, and the rank keeps its part, so that the same
seed gives the same model on every layout of tensor and pipeline ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Initializer = Callable[[Tensor, torch.Generator], None]
"""Fills a full fp32 tensor in place."""


def tag(
    parameter: nn.Parameter,
    init: Initializer,
    partition_dim: int | None = None,
    sections: Sequence[int] = (),
    partial_gradient: bool = False,
    width_multiplier: float = 1.0,
    decays: bool | None = None,
    matrix: bool = False,
) -> None:
    """Say how a parameter is initialised, split over the tensor-parallel group and scaled by width.

    Args:
        parameter: this rank's part.
        init: fills the full tensor.
        partition_dim: the dimension that is split; None where every rank holds all of it.
        sections: sizes, in the full tensor, of what is stacked along that dimension, each split by
            itself; none: one section.
        partial_gradient: every rank holds all of it, but sees only a part of its gradient: the
            gradient must be summed over the tensor-parallel group.
        width_multiplier: how many times as many inputs the full tensor has as where its
            hyperparameters were tuned (`nlscale.model.width`): what `init` fills in is divided by
            the root of it, the learning rate by it.
        decays: whether weight decay acts on it; None: if it has two dimensions or more. A gain says
            False whatever its shape: pulled toward zero, it would shrink what it scales.
        matrix: whether rules over whole matrices (`nlscale.optim.table`) take it: of
            [out, in] each section is one, of [heads, out, in] each head. What is looked up, gates
            entry by entry or is no linear map between features says False.
    """
    carrier: Any = parameter
    carrier.initializer = init
    carrier.sections = tuple(sections)
    carrier.partial_gradient = partial_gradient
    carrier.width_multiplier = width_multiplier
    carrier.decays = parameter.dim() > 1 if decays is None else decays
    carrier.matrix = matrix
    # the names under which megatron-core looks for the same
    carrier.tensor_model_parallel = partition_dim is not None
    carrier.partition_dim = -1 if partition_dim is None else partition_dim
    carrier.partition_stride = 1


def initialize(model: nn.Module, seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Set every parameter of the model in place."""
    with torch.no_grad():
        parameter: Any
        for name, parameter in model.named_parameters():
            full = draw(parameter, name, seed, tensor_size)
            parameter.copy_(split(full, parameter, tensor_size)[tensor_rank])


def draw(parameter: Any, name: str, seed: int, tensor_size: int) -> Tensor:
    """The initial values of a whole parameter of which this is one rank's part, fp32, on the CPU.

    Args:
        parameter: tagged with how it is initialised.
        name: in the whole model.
        seed: of the run.
        tensor_size: tensor-parallel ranks.
    """
    generator = torch.Generator().manual_seed(_seed(seed, name))
    full = torch.empty(full_shape(parameter, tensor_size), device="cpu")
    with torch.no_grad():
        parameter.initializer(full, generator)
        full *= parameter.width_multiplier**-0.5
    return full


def full_shape(parameter: Any, tensor_size: int) -> list[int]:
    """Shape of the whole parameter of which this is one rank's part."""
    shape = list(parameter.shape)
    if parameter.tensor_model_parallel:
        shape[parameter.partition_dim] *= tensor_size
    return shape


def split(full: Tensor, parameter: Any, tensor_size: int) -> list[Tensor]:
    """The parts of a whole tensor that is split as the (tagged) parameter is, by tensor rank."""
    if not parameter.tensor_model_parallel:
        return [full] * tensor_size
    dim = parameter.partition_dim
    sections = full.split(parameter.sections or (full.shape[dim],), dim)
    pieces = zip(*(section.chunk(tensor_size, dim) for section in sections), strict=True)
    return [torch.cat(piece, dim) for piece in pieces]


def join(parts: list[Tensor], parameter: Any) -> Tensor:
    """The whole tensor of which these are the parts by tensor rank; undoes `split`."""
    if not parameter.tensor_model_parallel:
        return parts[0]
    dim = parameter.partition_dim
    sizes = parameter.sections or (parts[0].shape[dim] * len(parts),)
    local = [size // len(parts) for size in sizes]
    by_section = zip(*(part.split(local, dim) for part in parts), strict=True)
    return torch.cat([torch.cat(section, dim) for section in by_section], dim)


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
    """Equally spaced values over the heads, [heads, ...]: memories of different reach."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        by_head = middle + width * torch.linspace(-1, 1, len(tensor))
        tensor.copy_(by_head.view(-1, *[1] * (tensor.dim() - 1)))

    return fill


def settled(middle: float, width: float) -> Initializer:
    """log(1 - alpha^2) of decays alpha whose logits are `spread`, [heads]: the noise with which a
    variance that decays by alpha^2 settles at 1."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        spread(middle, width)(tensor, generator)
        tensor.copy_(torch.log1p(-torch.sigmoid(tensor).square()))

    return fill


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1

"""What is stored: boxes of named tensors, as whoever holds or wants them cuts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """A box of a named tensor: what one rank holds or wants of it.

    Raises:
        ValueError: the box is not inside the tensor.
    """

    name: str
    """For example `weights/blocks.3.cms.mlps.0.up.weight`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Of the box in it, one a dimension."""
    data: torch.Tensor
    """The box, any strides; for reading, it is filled in place and its dtype is kept."""

    def __post_init__(self) -> None:
        sizes = self.data.shape
        inside = len(self.shape) == len(self.offsets) == len(sizes) and all(
            offset >= 0 and offset + size <= whole
            for whole, offset, size in zip(self.shape, self.offsets, sizes, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{self.name}: a box of {tuple(sizes)} at {tuple(self.offsets)} is not inside "
                f"a tensor of {tuple(self.shape)}"
            )


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all its elements, without what a file adds to them."""
        return math.prod(self.shape) * self.dtype.itemsize

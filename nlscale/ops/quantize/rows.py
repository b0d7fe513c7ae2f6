"""Where ranges of a flat tensor lie, packed as integers with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def largest(bits: int) -> int:
    """The largest integer of so many bits, whose negative is one too: 127 of 8, 7 of 4."""
    return int(2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Rows:
    """Ranges of a flat tensor, and where each lies packed, one row after the other.

    A row of n values: the scales of its blocks, fp32; the integers, with 4 bits two in a byte, the
    first in the low half; and what fills it up to a multiple of 4 bytes.
    """

    places: tuple[tuple[int, int, int], ...]
    """Start and length of each that is not empty, and the byte at which its row begins."""
    bytes: int
    """Of all."""
    bits: int
    """Of an integer: 8 or 4."""
    block: int
    """Values that share a scale; a multiple of 8."""
    table: Tensor
    """The same, int64 [rows, 3], on the device."""

    @classmethod
    def of(
        cls,
        ranges: list[tuple[int, int]],
        bits: int,
        block: int,
        device: torch.device,
        stride: int | None = None,
    ) -> Rows:
        """Rows one behind the other.

        Args:
            ranges: start and length of each.
            bits: of an integer.
            block: values that share a scale.
            device: where they are packed.
            stride: bytes between two rows; None: each takes what it needs.
        """
        places, end = [], 0
        for start, length in ranges:
            if length:
                places.append((start, length, end))
            end += row_bytes(length, bits, block) if stride is None else stride
        table = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 3)
        return cls(tuple(places), end, bits, block, table)

    @property
    def longest(self) -> int:
        """Values of the longest row."""
        return max((length for _, length, _ in self.places), default=0)


def row_bytes(length: int, bits: int, block: int) -> int:
    """Bytes of a row of so many values."""
    return 4 * (-(-length // block) + -(-length * bits // 32))

"""Gradients as integers with a scale for each block, packed for the wire, and what that leaves.

Of a block v of values, and with L the largest integer, 127 or 7,

    scale = max |v| / L, rounded up to 16 bits of its mantissa
    q     = v / scale, rounded to the nearest integer, ties to even
    left  = v - q scale

A product q scale has at most 24 bits: it, and the difference, are exact, so that q scale + left is
v to the bit, on every device, fused or not. A block of zeros has a scale of 0, and one of denormal
numbers may be left whole. The scale of a block with a value that is not finite is NaN, and so are
the block and what it leaves; one whose largest is within 2^-15 of the largest fp32 number may come
out infinite.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.ops.quantize.rows import Rows, largest

_LOW = 0xFF
"""The bits of a scale's mantissa that are cleared."""


def supports(values: Tensor) -> bool:
    """Whether the kernels take these values; where they do not, the torch form does."""
    return values.is_cuda and find_spec("triton") is not None


def pack(values: Tensor, error: Tensor, left: Tensor, rows: Rows, kernels: bool = True) -> Tensor:
    """Rows of values + error as integers, and what that leaves of them.

    Args:
        values: fp32, flat and contiguous, as `error` and `left`.
        error: what is added to the values.
        left: takes what rounding leaves; elsewhere than in the rows it stays as it is. It may be
            `error` itself.
        rows: of all three.
        kernels: whether the kernels for GPUs may be used.

    Returns:
        uint8 [rows.bytes].
    """
    packed = torch.empty(rows.bytes, dtype=torch.uint8, device=values.device)
    if kernels and supports(values):
        from nlscale.ops.quantize.kernels.packed import pack as fused

        fused(values, error, left, packed, rows)
        return packed
    for start, length, offset in rows.places:
        here, blocks = slice(start, start + length), -(-length // rows.block)
        total = values[here] + error[here]
        scales, integers = _integers(total, rows)
        begin = offset + 4 * blocks
        packed[offset:begin].view(torch.float32).copy_(scales)
        payload = _narrowed(integers.flatten()[:length], rows.bits)
        packed[begin : begin + len(payload)].copy_(payload)
        torch.sub(total, _times(integers, scales)[:length], out=left[here])
    return packed


def unpack(packed: Tensor, rows: Rows, out: Tensor, copies: int = 1, kernels: bool = True) -> None:
    """Write rows where they come from; of several copies of all of them, the sum.

    Args:
        packed: uint8 [copies * rows.bytes], copy behind copy.
        rows: of `out`.
        out: fp32, flat and contiguous.
        copies: added up in their order, in fp32.
        kernels: whether the kernels for GPUs may be used.
    """
    if kernels and supports(out):
        from nlscale.ops.quantize.kernels.packed import unpack as fused

        fused(packed, rows, out, copies)
        return
    for start, length, offset in rows.places:
        blocks, here = -(-length // rows.block), out[start : start + length].zero_()
        for first in range(offset, copies * rows.bytes, rows.bytes):
            begin = first + 4 * blocks
            scales = packed[first:begin].view(torch.float32)
            payload = packed[begin : begin + -(-length * rows.bits // 8)]
            integers = _in_blocks(_widened(payload, rows.bits)[:length], rows.block)
            here += _times(integers, scales)[:length]


def _integers(values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The scales of blocks, fp32 [blocks], and their integers, as fp32 [blocks, block]."""
    blocks = _in_blocks(values, rows.block)
    most = blocks.abs().amax(-1)
    scales = ((most / largest(rows.bits)).view(torch.int32) + _LOW & ~_LOW).view(torch.float32)
    scales = torch.where(most.isfinite(), scales, torch.nan)
    some = (scales > 0)[:, None]
    divided = torch.where(some, blocks, 0.0) / torch.where(some, scales[:, None], 1.0)
    return scales, divided.round()


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """[blocks, block], the last filled up with zeros."""
    return F.pad(values, (0, -len(values) % block)).view(-1, block)


def _times(integers: Tensor, scales: Tensor) -> Tensor:
    return (integers * scales[:, None]).flatten()


def _narrowed(integers: Tensor, bits: int) -> Tensor:
    """Flat fp32 integers as bytes."""
    narrow = integers.to(torch.int8).view(torch.uint8)
    if bits == 8:
        return narrow
    low, high = F.pad(narrow, (0, len(narrow) % 2)).view(-1, 2).unbind(1)
    return low & 15 | high << 4


def _widened(payload: Tensor, bits: int) -> Tensor:
    """Bytes as flat fp32 integers, which may be more than were narrowed."""
    if bits == 8:
        return payload.view(torch.int8).float()
    both = torch.stack([payload & 15, payload >> 4], dim=1).flatten()
    return ((both ^ 8).to(torch.int8) - 8).float()

"""The kernels of `nlscale.ops.quantize.blocks`: what crosses is read once and written once."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale.ops.device import on_device
from nlscale.ops.quantize.rows import Rows, largest

_VALUES = 2048
"""That a program holds at a time."""


def pack(values: Tensor, error: Tensor, left: Tensor, packed: Tensor, rows: Rows) -> None:
    """See `nlscale.ops.quantize.blocks.pack`."""
    if rows.longest:
        grid, sizes = _launch(rows)
        with on_device(values):
            pack_kernel[grid](
                values, error, left, packed, packed.view(torch.float32), rows.table,
                LIMIT=largest(rows.bits), **sizes,
            )  # fmt: skip


def unpack(packed: Tensor, rows: Rows, out: Tensor, copies: int) -> None:
    """See `nlscale.ops.quantize.blocks.unpack`."""
    if rows.longest:
        grid, sizes = _launch(rows)
        with on_device(out):
            unpack_kernel[grid](
                packed, packed.view(torch.float32), out, rows.table, copies, rows.bytes, **sizes
            )


def _launch(rows: Rows) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and sizes: a program takes some blocks of a row."""
    tile = max(1, _VALUES // rows.block)
    grid = (-(-rows.longest // (tile * rows.block)), len(rows.places))
    return grid, {"BITS": rows.bits, "BLOCK": rows.block, "TILE": tile, "num_warps": 4}


# Where rows begin is read from the table, whatever the alignment of a tensor. Not specialised on
# that, the kernel that a check has seen is the one that runs.
@triton.jit(
    do_not_specialize_on_alignment=["values", "error", "left", "payload", "scales", "table"]
)
def pack_kernel(
    values, error, left, payload, scales, table,
    LIMIT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program some blocks of a row: values + error, their integers, and what these leave."""
    row = table + 3 * tl.program_id(1)
    start = tl.load(row)
    length = tl.load(row + 1)
    offset = tl.load(row + 2)
    blocks = (length + BLOCK - 1) // BLOCK
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    if BITS == 8:
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        v = _total(values + start, error + start, at, length)
        scale = _scale(tl.max(_size(v), 1), LIMIT)
        q = _nearest(v, scale)
        _store_left(left + start, at, length, v, q, scale)
        place = payload + offset + 4 * blocks + at
        tl.store(place, q.to(tl.int32).to(tl.uint8), mask=at < length)
    else:
        byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        v = _total(values + start, error + start, 2 * byte, length)
        w = _total(values + start, error + start, 2 * byte + 1, length)
        scale = _scale(tl.maximum(tl.max(_size(v), 1), tl.max(_size(w), 1)), LIMIT)
        q = _nearest(v, scale)
        r = _nearest(w, scale)
        _store_left(left + start, 2 * byte, length, v, q, scale)
        _store_left(left + start, 2 * byte + 1, length, w, r, scale)
        both = (q.to(tl.int32) & 15) | ((r.to(tl.int32) & 15) << 4)
        place = payload + offset + 4 * blocks + byte
        tl.store(place, both.to(tl.uint8), mask=2 * byte < length)
    tl.store(scales + offset // 4 + block, scale, mask=block < blocks)


@triton.jit(
    do_not_specialize=["copies", "bytes_each"],
    do_not_specialize_on_alignment=["payload", "scales", "out", "table"],
)
def unpack_kernel(
    payload, scales, out, table, copies, bytes_each,
    BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program some blocks of a row: the sum over the copies."""
    row = table + 3 * tl.program_id(1)
    start = tl.load(row)
    length = tl.load(row + 1)
    offset = tl.load(row + 2)
    blocks = (length + BLOCK - 1) // BLOCK
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    if BITS == 8:
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        total = tl.zeros((TILE, BLOCK), tl.float32)
        for _ in range(copies):
            scale = tl.load(scales + offset // 4 + block, mask=block < blocks, other=0.0)
            q = tl.load(payload + offset + 4 * blocks + at, mask=at < length, other=0)
            total += q.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
            offset += bytes_each
        tl.store(out + start + at, total, mask=at < length)
    else:
        byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        low = tl.zeros((TILE, BLOCK // 2), tl.float32)
        high = tl.zeros((TILE, BLOCK // 2), tl.float32)
        for _ in range(copies):
            scale = tl.load(scales + offset // 4 + block, mask=block < blocks, other=0.0)
            q = tl.load(payload + offset + 4 * blocks + byte, mask=2 * byte < length, other=0)
            q = q.to(tl.int32)
            low += (((q & 15) ^ 8) - 8).to(tl.float32) * scale[:, None]
            high += ((((q >> 4) & 15) ^ 8) - 8).to(tl.float32) * scale[:, None]
            offset += bytes_each
        tl.store(out + start + 2 * byte, low, mask=2 * byte < length)
        tl.store(out + start + 2 * byte + 1, high, mask=2 * byte + 1 < length)


@triton.jit
def _total(values, error, at, length):
    inside = at < length
    return tl.load(values + at, mask=inside, other=0.0) + tl.load(
        error + at, mask=inside, other=0.0
    )


@triton.jit
def _size(v):
    """|v|; of what is not finite infinity: a maximum may pass over NaN."""
    size = tl.abs(v)
    return tl.where(size <= 3.4028234663852886e38, size, float("inf"))


@triton.jit
def _scale(most, LIMIT: tl.constexpr):
    scale = tl.div_rn(most, tl.zeros_like(most) + LIMIT)
    cut = (scale.to(tl.int32, bitcast=True) + 0xFF) & ~0xFF
    scale = cut.to(tl.float32, bitcast=True)
    return tl.where(most == float("inf"), float("nan"), scale)


@triton.jit
def _nearest(v, scale):
    """v / scale, at most 127, to the nearest integer: at 1.5 * 2^23 fp32 has no other numbers."""
    some = (scale > 0.0)[:, None]
    divided = tl.div_rn(tl.where(some, v, 0.0), tl.where(some, scale[:, None], 1.0))
    return (divided + 12582912.0) - 12582912.0


@triton.jit
def _store_left(left, at, length, v, q, scale):
    tl.store(left + at, v - q * scale[:, None], mask=at < length)

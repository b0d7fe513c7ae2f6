"""The kernels of `nlscale.ops.loss.cross_entropy`: logits are read once, and once written over."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale.ops.device import on_device

_COLUMNS = 4096
"""Of a row, that a program holds at a time."""


def row_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nlscale.ops.loss.cross_entropy.row_statistics`; fp32."""
    rows, columns = logits.shape
    found = tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    with on_device(logits):
        statistics_kernel[(rows,)](
            logits, targets, *found, columns, **_tile(columns)
        )  # fmt: skip
    return found  # type: ignore[return-value]


def to_gradient_(
    logits: Tensor, targets: Tensor, log_sum: Tensor, d_loss: Tensor, z_loss: float = 0.0
) -> None:
    """See `nlscale.ops.loss.cross_entropy.to_gradient_`."""
    rows, columns = logits.shape
    tile = _tile(columns)
    with on_device(logits):
        gradient_kernel[(rows, -(-columns // tile["COLUMNS"]))](
            logits, targets, log_sum.contiguous(), d_loss.contiguous(), z_loss, columns, **tile
        )


def _tile(columns: int) -> dict[str, int]:
    width = min(_COLUMNS, triton.next_power_of_2(columns))
    return {"COLUMNS": width, "num_warps": 8 if width == _COLUMNS else 4, "num_stages": 1}


@triton.jit
def statistics_kernel(
    logits, targets, largest, total, at_target, columns, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program a row: the largest so far, and the sum of exp relative to it."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    most = float("-inf")
    found = 0.0
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, tl.max(x, 0))
        # while all are -inf, 0 is taken from them: -inf from -inf is NaN. What is NaN stays it.
        base = tl.where(more == float("-inf"), 0.0, more)
        found = found * tl.exp(most - base) + tl.sum(tl.exp(x - base), 0)
        most = more
    target = tl.load(targets + row)
    here = (target >= 0) & (target < columns)
    tl.store(largest + row, most)
    tl.store(total + row, found)
    tl.store(at_target + row, tl.load(start + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits, targets, log_sum, d_loss, z_loss, columns, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program a row and some of its columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + row.to(tl.int64) * columns + column
    x = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.load(log_sum + row)
    share = tl.exp(x - total) * (1.0 + 2.0 * z_loss * total)
    share = share - tl.where(column == tl.load(targets + row), 1.0, 0.0)
    gradient = share * tl.load(d_loss + row)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < columns)

"""Softmax attention of each token over a window: itself and those just before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, position: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of each token over itself and at most window - 1 before it.

    Blocks of as many queries as the window is long see the keys of two blocks, so that time and
    memory grow with the sequence as they do for a memory. Nothing but q, k and v is kept: the
    backward pass makes the rest again.

    Args:
        q: [batch, heads, time, d].
        k, v: [batch, heads, window - 1 + time, d]: first the window - 1 tokens that came before q.
            Of fewer heads each is shared by as many of q, one group after the other.
        window: tokens that each sees.
        position: how many tokens came before each in its document or sequence, int64 [batch, time]
            or [1, time]: those before these are not seen, whatever stands there.

    Returns:
        [batch, heads, time, d].
    """
    return _Windows.apply(q, k, v, window, position)  # type: ignore[no-any-return]


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, position: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, position)
        ctx.window = window
        return _attended(q, k, v, window, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *given, position = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            q, k, v = leaves
            out = _attended(q, k, v, ctx.window, position)
        return *torch.autograd.grad(out, leaves, d_out), None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, window: int, position: Tensor) -> Tensor:
    batch, heads, time, d = q.shape
    size = min(window, time)  # queries of a block, which see that many keys and window - 1 more
    count = -(-time // size)
    missing = count * size - time
    groups = heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    blocks = F.pad(q, (0, 0, 0, missing)).unflatten(2, (count, size))
    k_of, v_of = (
        F.pad(x, (0, 0, 0, missing)).unfold(2, window - 1 + size, size).mT for x in (k, v)
    )
    # what fills the last block up sees itself: no row of scores without an entry
    place = F.pad(position, (0, missing)).view(-1, count, size)
    seen = _seen(place, window, size).expand(batch, count, size, -1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (blocks, k_of, v_of))
    read = F.scaled_dot_product_attention(q, k, v, seen.flatten(0, 1)[:, None])
    by_head = read.view(batch, count, heads, size, d).transpose(1, 2)
    return by_head.flatten(2, 3)[:, :, :time]


def _seen(position: Tensor, window: int, size: int) -> Tensor:
    """Which of its block's keys each query sees, bool [batch, blocks, size, window - 1 + size]."""
    query = torch.arange(size, device=position.device)[:, None] + window - 1
    before = query - torch.arange(window - 1 + size, device=position.device)
    return (before >= 0) & (before < window) & (before <= position[..., None])

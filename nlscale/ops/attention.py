"""Causal softmax attention, by torch's kernels; on a CPU, in training, by matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.by_hand import wide
from nlscale.ops.documents import Documents

_QUERIES = 128
"""Of a block: whole rows of its scores are held at a time."""
_LONGEST = 512
"""Sequence that is taken by matrix products. Scores of longer ones go to memory and back, which
torch's kernel spares."""
_SCORES = 2**18
"""That are held at a time, unless those of one block in one head are more: what a core's cache
holds."""

_SEEN = 2**22
"""Pairs of a query and a key of which a mask is held at a time, unless those of one query are
more."""


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    kernels: bool = True,
    past: Tensor | int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of each token over itself and those before it.

    Args:
        q: [batch, heads, time, d].
        k, v: [batch, heads, past + time, d]: what came before q first. Of fewer heads each is
            shared by as many of q, one group after the other.
        documents: where each token sees only those of its document; nothing came before then.
        kernels: on a GPU, and for bf16, treat documents as sequences of their own, so that nothing
            is spent on pairs of tokens that do not see each other. Else they are masked out. On a
            CPU, take whole sequences by matrix products (`_ByBlocks`).
        past: how many keys came before q; of each row, int64 [batch], where they differ: they stand
            at the first places, and what stands behind those of q is not seen. None: all but q's.

    Returns:
        [batch, heads, time, d].
    """
    if past is None:
        past = k.shape[2] - q.shape[2]
    grouped = k.shape[1] < q.shape[1]
    if grouped and q.shape[2] == 1 and documents is None:
        return _one_token(q, k, v, past)
    causal = documents is None and isinstance(past, int) and past == 0
    if grouped and not (causal and takes_packed(q)):  # its kernel takes them as they are
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if documents is not None:
        if kernels and takes_packed(q):
            return _packed(q, k, v, documents)
        return F.scaled_dot_product_attention(q, k, v, documents.attends())
    time = q.shape[2]
    if isinstance(past, Tensor):
        return _later_piece(q, k, v, past.to(k.device))
    by_blocks = (
        kernels and not q.is_cuda and torch.is_grad_enabled() and _QUERIES < time <= _LONGEST
    )
    if past == 0 and by_blocks:
        return _ByBlocks.apply(q, k, v)  # type: ignore[no-any-return]
    if past == 0:
        native = k.shape[1] < q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=native)
    if time == 1:
        return F.scaled_dot_product_attention(q, k, v)
    return _later_piece(q, k, v, torch.full((1,), past, device=k.device))


def _later_piece(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """Of a piece after others; `past`, [batch] or [1], came before.

    The mask that says what each token sees is as large as the scores of a head: it is made for a
    block of queries at a time.
    """
    time, keys = q.shape[2], k.shape[2]
    step = max(1, _SEEN // (len(past) * keys))
    read = []
    for first in range(0, time, step):
        queries = q[:, :, first : first + step]
        seen = seen_by(past + first, queries.shape[2], keys)
        read.append(F.scaled_dot_product_attention(queries, k, v, seen))
    return read[0] if len(read) == 1 else torch.cat(read, 2)


def _one_token(q: Tensor, k: Tensor, v: Tensor, past: int | Tensor) -> Tensor:
    """Of a token after all keys: the queries that share them are so many of one head, and nothing
    is copied."""
    seen = seen_by(past.to(k.device), 1, k.shape[2]) if isinstance(past, Tensor) else None
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, seen).view(q.shape)


def seen_by(past: Tensor, time: int, keys: int) -> Tensor:
    """Which keys each token sees, bool [batch, 1, time, keys]; `past`, [batch], came before."""
    last = past[:, None] + torch.arange(time, device=past.device)
    return (torch.arange(keys, device=past.device) <= last[..., None])[:, None]


def takes_packed(q: Tensor) -> bool:
    """Whether torch's kernel for sequences of several lengths takes these queries."""
    d = q.shape[-1]
    return q.is_cuda and q.dtype == torch.bfloat16 and d % 8 == 0 and d <= 256


def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports much, and most runs do not call it

    batch, heads, time, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * time, heads, d) for x in (q, k, v))
    bounds, longest = documents.bounds, documents.longest
    read = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
    assert isinstance(read, Tensor), "nothing but the output was asked for"
    return read.view(batch, time, heads, d).transpose(1, 2)


class _ByBlocks(torch.autograd.Function):
    """Attention of whole sequences, for a block of queries over all keys up to its end at a time.

    Torch's kernel for CPUs takes blocks of keys as well, and its products are so small that they
    are slow. Scores are made again in the backward pass: nothing but q, k and v is kept.

        P = softmax(Q K^T / sqrt(d))       O = P V
        dV = P^T dO        dP = dO V^T     dS = P * (dP - sum over keys of P * dP)
        dQ = dS K / sqrt(d)                dK = dS^T Q / sqrt(d)

    Scores and dP are computed in at least fp32; what P and dS are multiplied with has the dtype of
    q, and so have they.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        given = [x.flatten(0, 1) for x in (q, k, v)]
        out = torch.empty_like(given[0], memory_format=torch.contiguous_format)
        for heads, blocks in _blocks(*given[0].shape[:2]):
            q_s, k_s, v_s = (x[heads] for x in given)
            q_wide, k_wide = _scaled(q_s), k_s.to(wide(k))
            for first, last in blocks:
                p = _probabilities(q_wide, k_wide, first, last)
                out[heads, first:last] = torch.bmm(p.to(v.dtype), v_s[:, :last])
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        shape, dtype, d = q.shape, q.dtype, q.shape[-1]
        q, k, v, d_out = (x.flatten(0, 1) for x in (q, k, v, d_out))
        d_q, d_k, d_v = (q.new_empty(q.shape) for _ in range(3))
        for heads, blocks in _blocks(*q.shape[:2]):
            q_s, k_s, v_s, d_y = (x[heads].contiguous() for x in (q, k, v, d_out))
            q_wide, k_wide, v_wide, d_wide = _scaled(q_s), *(x.to(wide(q)) for x in (k_s, v_s, d_y))
            # [d, keys]: a product whose left side is a transposed P or dS would copy it first
            q_t, d_y_t = q_s.mT.contiguous(), d_y.mT.contiguous()
            d_keys, d_values = (k_wide.new_zeros(k_wide.mT.shape) for _ in range(2))
            for first, last in blocks:
                p = _probabilities(q_wide, k_wide, first, last)
                d_p = torch.bmm(d_wide[:, first:last], v_wide[:, :last].mT)
                d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype).to(dtype)
                d_values[:, :, :last] += torch.bmm(d_y_t[:, :, first:last], p.to(dtype))
                d_keys[:, :, :last] += torch.bmm(q_t[:, :, first:last], d_s)
                torch.mul(torch.bmm(d_s, k_s[:, :last]), d**-0.5, out=d_q[heads, first:last])
            d_k[heads], d_v[heads] = d_keys.mul_(d**-0.5).mT, d_values.mT
        return d_q.view(shape), d_k.view(shape), d_v.view(shape)


def _blocks(heads: int, length: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Heads that are taken at a time, and the first and last query of each block."""
    step = max(1, _SCORES // (_QUERIES * length))
    blocks = [(i, min(i + _QUERIES, length)) for i in range(0, length, _QUERIES)]
    for first in range(0, heads, step):
        yield slice(first, first + step), blocks


def _scaled(q: Tensor) -> Tensor:
    return q.to(wide(q)) * q.shape[-1] ** -0.5


def _probabilities(q: Tensor, k: Tensor, first: int, last: int) -> Tensor:
    """Of the keys up to the last, for queries from first to last, [heads, queries, keys]."""
    scores = torch.bmm(q[:, first:last], k[:, :last].mT)
    scores[:, :, first:] += _later(last - first, q.dtype)
    return torch.softmax(scores, -1)


@lru_cache(maxsize=4)
def _later(size: int, dtype: torch.dtype) -> Tensor:
    """-inf for keys after the query, else 0."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)

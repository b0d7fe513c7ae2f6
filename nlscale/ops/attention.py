"""Causal softmax attention, by torch's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.ops.documents import Documents


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, kernels: bool = True
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of each token over itself and those before it.

    Args:
        q: [batch, heads, time, d].
        k, v: [batch, heads, past + time, d]: what came before q first.
        documents: where each token sees only those of its document; nothing came before then.
        kernels: on a GPU, and for bf16, treat documents as sequences of their own, so that nothing
            is spent on pairs of tokens that do not see each other. Else they are masked out.

    Returns:
        [batch, heads, time, d].
    """
    if documents is not None:
        if kernels and takes_packed(q):
            return _packed(q, k, v, documents)
        return F.scaled_dot_product_attention(q, k, v, documents.attends())
    time, past = q.shape[2], k.shape[2] - q.shape[2]
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(time, past + time, dtype=torch.bool, device=k.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, mask)


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

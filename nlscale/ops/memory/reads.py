"""The reads of all chunks, once their keys, decays and writes are known.

Part of the chunk form (docs/concepts/memory.md). Nothing here is serial. The notation is that of
`nlscale.ops.memory.chunk`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.memory.main import row_dot
from nlscale.ops.threads import on_one_thread

_IN_CACHE = 2**17
"""Numbers of each tensor."""


class ChunkReads(torch.autograd.Function):
    """What the queries of each chunk read from the main memory, of which Z stands here for a part.

        Y = exp(g) q Z^T + A D  [ + (1 - exp(g)) q ]            A = F" * (q k^T)

    Backward, with B = (dY D^T) * F" and G = exp(g) dY:

        dD = A^T dY         dZ = G^T q         R = B k + G Z [ - G ]
        dq = R [ + dY ]     dk = B^T q         dg = q . R - k . dk   row by row
    """

    @staticmethod
    @on_one_thread
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        g: Tensor,
        fade: Tensor,
        main: Tensor,
        written: Tensor,
        anchored: bool,
    ) -> Tensor:
        """q [n, N, C, d], the rest as `ChunkWrites` returns it; returns the reads, like q."""
        out, scores = q.new_empty(q.shape), fade.new_empty(fade[:, :, 1:].shape)
        for s in _blocks(q):
            q_s, k_s, main_s, written_s = (x[s].flatten(0, 1) for x in (q, k, main, written))
            since_start = torch.exp(g[s].flatten(0, 1)[:, 1:, None])
            score = torch.bmm(q_s, k_s.mT).mul_(fade[s].flatten(0, 1)[:, 1:])
            read = torch.bmm(q_s, main_s.mT).mul_(since_start).baddbmm_(score, written_s)
            if anchored:
                read.addcmul_(q_s, 1 - since_start)
            out[s], scores[s] = read.view(out[s].shape), score.view(scores[s].shape)
        ctx.save_for_backward(q, k, g, fade, main, written, scores)
        ctx.anchored = anchored
        return out

    @staticmethod
    @on_one_thread
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, g, fade, main, written, scores = ctx.saved_tensors
        d_q, d_k, d_g = q.new_empty(q.shape), k.new_empty(k.shape), torch.zeros_like(g)
        d_main, d_written = k.new_empty(main.shape), k.new_empty(k.shape)
        for s in _blocks(q):
            q_s, k_s, main_s, written_s, score, d_y = (
                x[s].flatten(0, 1) for x in (q, k, main, written, scores, d_out)
            )
            d_score = torch.bmm(d_y, written_s.mT).mul_(fade[s].flatten(0, 1)[:, 1:])
            faded = d_y * torch.exp(g[s].flatten(0, 1)[:, 1:, None])
            d_qs = torch.bmm(faded, main_s).baddbmm_(d_score, k_s)
            if ctx.anchored:
                d_qs.sub_(faded)
            d_ks = torch.bmm(d_score.mT, q_s, out=d_k[s].flatten(0, 1))
            d_gs = (row_dot(q_s, d_qs) - row_dot(k_s, d_ks))[..., 0]
            if ctx.anchored:
                d_qs.add_(d_y)
            d_g[s, :, 1:], d_q[s] = d_gs.view(d_g[s, :, 1:].shape), d_qs.view(d_q[s].shape)
            torch.bmm(score.mT, d_y, out=d_written[s].flatten(0, 1))
            torch.bmm(faded.mT, q_s, out=d_main[s].flatten(0, 1))
        return d_q, d_k, d_g, None, d_main, d_written, None


def _blocks(x: Tensor) -> list[slice]:
    """All chunks at once; on a CPU as many at a time as stay in its cache."""
    count, size = x.shape[0], x[0].numel()
    step = max(1, _IN_CACHE // size) if x.device.type == "cpu" else count
    return [slice(i, i + step) for i in range(0, count, step)]

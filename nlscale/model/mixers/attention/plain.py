"""Softmax attention in plain torch: `nlscale.model.mixers.attention.module`, to be read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.model.plain import PlainLinear, PlainMixer, PlainRMSNorm, State, wide


class PlainAttention(PlainMixer):
    """Queries, keys and values of each head by projections of x, positions by rotation.

    Its state:
        keys, values  rotated keys and values so far, [batch, key-value heads, slots, d]
        slots         position in its row of what stands in each slot, int64 [batch, slots];
                      -1 where nothing does, because the piece was shorter in this row
        position      tokens of each row so far, int64 [batch]

    With a window each token sees that many alone, itself among them.
    """

    def __init__(
        self,
        d_model: int,
        norm_eps: float,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        rope_base: float,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_base, self.window = rope_base, window
        self.project = PlainLinear(d_model, (heads + 2 * kv_heads) * head_dim)
        self.output = PlainLinear(heads * head_dim, d_model, into_residual=True)
        self.query_norm = PlainRMSNorm(head_dim, norm_eps) if qk_norm else None
        self.key_norm = PlainRMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(self, x: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        time = x.shape[1]
        by_head = self.project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = by_head.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        count = torch.arange(time, device=x.device)
        first = torch.zeros_like(lengths) if state is None else state["position"]
        position, reads = first[:, None] + count, count < lengths[:, None]
        q, k = self._rotate(q, position), self._rotate(k, position)
        slots = torch.where(reads, position, -1)
        if state is not None:
            k, v = torch.cat([state["keys"], k], 2), torch.cat([state["values"], v], 2)
            slots = torch.cat([state["slots"], slots], 1)
        whole = self.window is None or time <= self.window
        if state is None and whole and bool(reads.all()):
            mask, causal = None, True
        else:
            seen = (slots[:, None] >= 0) & (slots[:, None] <= position[..., None])
            if self.window is not None:
                seen = seen & (slots[:, None] > position[..., None] - self.window)
            # what is no token sees all, so that it stays finite
            mask, causal = (seen | ~reads[..., None])[:, None], False
        groups = self.heads // self.kv_heads
        each_k, each_v = (y.repeat_interleave(groups, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, each_k, each_v, mask, is_causal=causal)
        end = first + lengths
        if self.window is not None:  # what no row sees any more goes
            held = (slots > end[:, None] - self.window).any(0)
            k, v, slots = k[:, :, held], v[:, :, held], slots[:, held]
        after = {"keys": k, "values": v, "slots": slots, "position": end}
        return self.output(out.transpose(1, 2).flatten(2)), after

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotary positions [batch, time] of x [batch, heads, time, d], halves rotated together."""
        half, x_wide = self.head_dim // 2, wide(x)
        steps = torch.arange(half, device=x.device, dtype=x_wide.dtype) / half
        angle = (position.to(x_wide.dtype)[..., None] * self.rope_base**-steps)[:, None]
        cos, sin = angle.cos(), angle.sin()
        left, right = x_wide.chunk(2, -1)
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        return turned.to(x.dtype)

"""Causal softmax attention with rotary positions: the mixer of Hope-Attention and Transformers.

`sliding-window` is the same of each token over a window that ends with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.config.vocabulary import Config, ModelConfig, head_dim, kv_heads
from nlscale.model.init import normal
from nlscale.model.layers import RMSNorm, column_linear, recomputed, row_linear
from nlscale.model.mixers.attention.facts import AttentionFacts
from nlscale.model.mixers.attention.one_token import AttentionOneToken
from nlscale.model.mixers.attention.state import AttentionState, WindowState
from nlscale.model.mixers.module import Mixer, Way
from nlscale.model.width import width_multiplier
from nlscale.ops import pointwise
from nlscale.ops.attention import causal_attention
from nlscale.ops.check import attention_errors
from nlscale.ops.documents import Documents
from nlscale.ops.pointwise import compiled_on_gpu
from nlscale.ops.window import window_attention


class Attention(Mixer):
    """Queries, keys and values of each head by projections of x, positions by rotation."""

    def __init__(
        self,
        facts: AttentionFacts,
        model: ModelConfig,
        megatron: TransformerConfig,
        residual_std: float,
        recompute: bool,
        kernels: bool,
    ) -> None:
        super().__init__()
        tensor_ranks, size = megatron.tensor_model_parallel_size, head_dim(model)
        self.heads, self.kv_heads = model.heads // tensor_ranks, kv_heads(model) // tensor_ranks
        self.head_dim, self.rope_base = size, model.rope_base
        self.window = facts.window(model)
        d, wider = model.d_model, width_multiplier(model)
        width, kv_width = model.heads * size, kv_heads(model) * size
        outputs = [width, kv_width, kv_width]
        self.project = column_linear(megatron, d, outputs, normal(model.init_std), wider)
        self.output = row_linear(megatron, width, d, normal(residual_std), wider)
        norm = partial(RMSNorm, megatron, size, model.norm_eps, kernels, of_heads=True)
        self.query_norm = norm() if model.attention.qk_norm else None
        self.key_norm = norm() if model.attention.qk_norm else None
        self.recompute = recompute
        self.kernels = kernels
        self.rotate = compiled_on_gpu(pointwise.rotate, kernels)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        projected, _ = self.project(x)
        mix = partial(recomputed, self._mix) if self.recompute else self._mix
        mixed, state = mix(projected, state, documents, lengths)
        return self.output(mixed)[0], state

    def _mix(
        self,
        projected: Tensor,
        state: Any,
        documents: Documents | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """q, k and v side by side -> what the heads read, [sequence, batch, local width]."""
        length, batch, _ = projected.shape
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            x.view(length, batch, -1, self.head_dim).permute(1, 2, 0, 3)
            for x in projected.split(widths, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        past = 0 if state is None else state.past()
        q, k = (self.rotate(x, self.rope_base, past) for x in (q, k))
        if self.window is not None:
            out, state = self._over_window(q, k, v, state, documents, lengths)
        else:
            if state is None:
                state = AttentionState.begun(k, v, lengths)
            else:
                state, k, v = state.add(k, v, lengths)
            out = causal_attention(q, k, v, documents, self.kernels, past)
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1), state

    def _over_window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState | None,
        documents: Documents | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, WindowState]:
        """What each token reads off the window that ends with it, and the last window."""
        assert self.window is not None
        anew = state is None
        if state is None:
            state = WindowState.begun(k, self.window)
        after, every_k, every_v = state.add(k, v, lengths)
        if anew and q.shape[2] <= self.window:  # which is no window yet
            return causal_attention(q, k, v, documents, self.kernels, 0), after
        if documents is None:
            time = torch.arange(q.shape[2], device=q.device)
            past = state.past()
            position = (past.to(q.device)[:, None] if isinstance(past, Tensor) else past) + time
            position = position.view(-1, len(time))
        else:
            position = documents.position
        return window_attention(q, every_k, every_v, self.window, position), after

    def one_token(self) -> AttentionOneToken:
        return AttentionOneToken(self)

    def projected(self) -> list[str]:
        return ["query", "key", "value"]

    @staticmethod
    def ways(
        facts: AttentionFacts,
        model: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Way]:
        q, k, v = (
            torch.randn(
                batch, heads, length, head_dim(model), device=device, dtype=dtype,
                requires_grad=True,
            )
            for heads in (model.heads, kv_heads(model), kv_heads(model))
        )  # fmt: skip
        window = facts.window(model)
        if window is None or length <= window:
            return [Way("sdpa", lambda: causal_attention(q, k, v), [q, k, v])]
        position = torch.arange(length, device=device)[None]

        def by_windows() -> Tensor:
            every_k, every_v = (F.pad(x, (0, 0, window - 1, 0)) for x in (k, v))
            return window_attention(q, every_k, every_v, window, position)

        return [Way("sdpa by windows", by_windows, [q, k, v])]

    @staticmethod
    def kernel_errors(
        facts: AttentionFacts, config: Config, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, float]]:
        if not config.data.document_mask or facts.cut(config):
            return {"torch": {}}
        return {"torch": attention_errors(head_dim(config.model), dtype, device)}

"""Causal softmax attention with rotary positions: the mixer of Hope-Attention and Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.config.vocabulary import Config, ModelConfig, head_dim
from nlscale.model.init import normal
from nlscale.model.layers import column_linear, recomputed, row_linear
from nlscale.model.mixers.attention.facts import AttentionFacts
from nlscale.model.mixers.module import Mixer, Way
from nlscale.model.width import width_multiplier
from nlscale.ops import pointwise
from nlscale.ops.attention import causal_attention
from nlscale.ops.check import attention_errors
from nlscale.ops.documents import Documents
from nlscale.ops.pointwise import compiled_on_gpu


@dataclass
class AttentionState:
    """Keys (rotated) and values so far, [batch, heads, time, d]."""

    keys: Tensor
    values: Tensor


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
        self.heads = model.heads // megatron.tensor_model_parallel_size
        self.head_dim, self.rope_base = head_dim(model), model.rope_base
        d, wider = model.d_model, width_multiplier(model)
        self.project = column_linear(megatron, d, [d] * 3, normal(model.init_std), wider)
        self.output = row_linear(megatron, d, d, normal(residual_std), wider)
        self.recompute = recompute
        self.kernels = kernels
        self.rotate = compiled_on_gpu(pointwise.rotate, kernels)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, AttentionState]:
        projected, _ = self.project(x)
        mix = partial(recomputed, self._mix) if self.recompute else self._mix
        mixed, state = mix(projected, state, documents)
        return self.output(mixed)[0], state

    def _mix(
        self, projected: Tensor, state: AttentionState | None, documents: Documents | None
    ) -> tuple[Tensor, AttentionState]:
        """q, k and v side by side -> what the heads read, [sequence, batch, local width]."""
        length, batch, _ = projected.shape
        shape = (length, batch, 3, self.heads, self.head_dim)
        q, k, v = projected.view(shape).permute(2, 1, 3, 0, 4)
        past = 0 if state is None else state.keys.shape[2]
        q, k = (self.rotate(x, self.rope_base, past) for x in (q, k))
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        out = causal_attention(q, k, v, documents, self.kernels)
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1), AttentionState(k, v)

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
        shape = (batch, model.heads, length, head_dim(model))
        q, k, v = (
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        return [Way("sdpa", lambda: causal_attention(q, k, v), [q, k, v])]

    @staticmethod
    def kernel_errors(
        facts: AttentionFacts, config: Config, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, float]]:
        if not config.data.document_mask:
            return {"torch": {}}
        return {"torch": attention_errors(head_dim(config.model), dtype, device)}

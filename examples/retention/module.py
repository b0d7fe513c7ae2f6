"""Retention: a linear memory that every head forgets at a rate of its own (arXiv 2307.08621).

    S_t = g S_{t-1} + k_t v_t^T        y_t = W_o norm(q_t S_t)        g = 1 - 2^(-5 - head)

Within a piece of a sequence all tokens at once, from one piece to the next by the state S.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.config.vocabulary import ModelConfig, head_dim
from nlscale.model.init import normal
from nlscale.model.layers import column_linear, recomputed, row_linear
from nlscale.model.mixers.facts import MixerFacts
from nlscale.model.mixers.module import Mixer, State
from nlscale.model.width import width_multiplier
from nlscale.ops.documents import Documents


@dataclass
class RetentionState(State):
    """S in fp32, [batch, heads, d, d], which begins as zeros."""

    s: Tensor


class Retention(Mixer):
    """Queries, keys and values of each head by projections of x."""

    log_decay: Tensor

    def __init__(
        self,
        facts: MixerFacts,
        model: ModelConfig,
        megatron: TransformerConfig,
        residual_std: float,
        recompute: bool,
        kernels: bool,
    ) -> None:
        super().__init__()
        self.heads = model.heads // megatron.tensor_model_parallel_size
        self.head_dim, self.recompute, self.eps = head_dim(model), recompute, model.norm_eps
        d, wider = model.d_model, width_multiplier(model)
        self.project = column_linear(megatron, d, [d] * 3, normal(model.init_std), wider)
        self.output = row_linear(megatron, d, d, normal(residual_std), wider)
        # a rank holds the heads of its own, and they the rates of their place among all
        head = get_tensor_model_parallel_rank() * self.heads + torch.arange(self.heads)
        self.register_buffer("log_decay", torch.log1p(-(2.0 ** (-5.0 - head))), persistent=False)

    def forward(
        self,
        x: Tensor,
        state: RetentionState | None = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState]:
        projected, _ = self.project(x)
        mix = partial(recomputed, self._mix) if self.recompute else self._mix
        read, s = mix(projected, None if state is None else state.s, documents, lengths)
        return self.output(read)[0], RetentionState(s)

    def _mix(
        self,
        projected: Tensor,
        state: Tensor | None,
        documents: Documents | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """q, k and v side by side, [sequence, batch, 3 local width] -> reads, and S in fp32."""
        length, batch, _ = projected.shape
        shape = (length, batch, 3, self.heads, self.head_dim)
        q, k, v = projected.view(shape).permute(2, 1, 3, 0, 4)
        q = q * self.head_dim**-0.5
        log_decay = self.log_decay.float()[:, None, None]
        time = torch.arange(length, device=projected.device)
        apart = (time[:, None] - time).clamp(min=0)
        decay = torch.exp(log_decay * apart).tril().to(q.dtype)
        if documents is not None:
            decay = decay * documents.attends()
        read = (q @ k.mT * decay) @ v
        read_of = torch.full((batch,), length) if lengths is None else lengths
        n = read_of.to(projected.device)[:, None, None]
        left = torch.exp(log_decay[..., 0] * (n - 1 - time).clamp(min=0)) * (time < n)
        new = (k.float() * left[..., None]).mT @ v.float()
        if state is not None:
            since = torch.exp(log_decay[..., 0] * (time + 1))[..., None]
            read = read + (since * (q.float() @ state)).to(read.dtype)
            new = new + torch.exp(log_decay * n[..., None]) * state
        read = F.rms_norm(read, (self.head_dim,), eps=self.eps)
        return read.permute(2, 0, 1, 3).reshape(length, batch, -1), new

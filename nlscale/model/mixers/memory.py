"""The mixers with a memory: `hope`, `hope-pure`, `hope-paper` and `gated-delta` (MATH 4).

One code path. `gated-delta` is the same with the projections static: no memory makes k, v and
the gates. Heads are split over the tensor-parallel group; the scan is local to a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config import Mixer, ModelConfig
from nlscale.model.init import constant, normal, orthogonal, spread, tag
from nlscale.model.layers import column_linear, recomputed, row_linear
from nlscale.model.sizes import head_dim
from nlscale.model.width import width_multiplier
from nlscale.ops.memory import MemoryRules, MemoryState, MemoryWeights, memory_scan, normalize

_GATE_STD = 0.02


@dataclass
class MixerState:
    """What a memory mixer carries from one piece of a sequence to the next."""

    tail: Tensor
    """The last inputs of the convolution, [window - 1, batch, channels]."""
    memory: MemoryState


class MemoryMixer(nn.Module):
    """x [sequence, batch, d_model] -> the same shape, causal, one state a head and sequence.

    a, b  = SiLU(convolution(W_a x)), SiLU(convolution(W_b x))     inputs of k and of v
    q     = normalize(W_q x)                                       static queries
    y     = W_o ( RMSNorm(read) * SiLU(W_g x) )                    each if configured
    """

    def __init__(
        self, model: ModelConfig, mc: TransformerConfig, residual_std: float, recompute: bool
    ) -> None:
        super().__init__()
        memory, d, tp = model.memory, model.d_model, mc.tensor_model_parallel_size
        self.heads, self.head_dim = model.heads // tp, head_dim(model)
        self.norm_eps = model.norm_eps
        self.inputs = 2 if memory.separate_inputs else 1
        self.gated = bool(memory.output_gate)
        self.rules = MemoryRules(
            chunk=memory.chunk,
            anchored=bool(memory.anchored),
            c=float(memory.c or 0.0),
            normalize_value=bool(memory.normalize_value),
            main_memory=model.mixer in (Mixer.hope, Mixer.gated_delta),
        )
        self.static_gates = bool(memory.static_gates)
        self.recompute = recompute
        local, dtype = self.heads * self.head_dim, mc.params_dtype
        outputs = [d] * (self.inputs + 1 + self.gated) + [model.heads] * (2 * self.static_gates)
        wider = width_multiplier(model)
        self.project = column_linear(mc, d, outputs, normal(model.init_std), wider)
        self.output = row_linear(mc, d, d, normal(residual_std), wider)
        self.convolution = nn.Parameter(
            torch.empty(memory.convolution, self.inputs * local, dtype=dtype)
        )
        tag(self.convolution, normal(memory.convolution**-0.5), 1, [d] * self.inputs)
        self.eta_bias = nn.Parameter(torch.empty(self.heads, dtype=dtype))
        self.alpha_bias = nn.Parameter(torch.empty(self.heads, dtype=dtype))
        tag(self.eta_bias, constant(float(memory.eta_bias or 0.0)), 0)
        tag(self.alpha_bias, spread(memory.alpha_bias, 1.0), 0)
        if memory.read_norm:
            self.read_norm = nn.Parameter(torch.empty(self.heads, self.head_dim, dtype=dtype))
            tag(self.read_norm, constant(1.0), 0)
        else:
            self.register_parameter("read_norm", None)
        self._add_memories(model, dtype)

    def _add_memories(self, model: ModelConfig, dtype: torch.dtype) -> None:
        h, n = self.heads, self.head_dim
        self.modifies_itself = model.mixer != Mixer.gated_delta
        if not self.modifies_itself:
            return
        self.memory_key = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_value = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_gates = nn.Parameter(torch.empty(h, 2, n, dtype=dtype))
        tag(self.memory_key, orthogonal, 0)
        tag(self.memory_value, orthogonal, 0)
        tag(self.memory_gates, normal(_GATE_STD), 0)
        if model.mixer == Mixer.hope:
            start = float(model.memory.lambda_init or 0.0)
            self.lambda_key = nn.Parameter(torch.empty(h, dtype=dtype))
            self.lambda_value = nn.Parameter(torch.empty(h, dtype=dtype))
            tag(self.lambda_key, constant(start), 0)
            tag(self.lambda_value, constant(start), 0)
        else:
            self.memory_read = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
            tag(self.memory_read, orthogonal, 0)

    def forward(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        projected, _ = self.project(x)
        mix = partial(recomputed, self._mix) if self.recompute else self._mix
        read, state = mix(projected, state)
        return self.output(read)[0], state

    def _mix(self, projected: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Inputs, queries and gates side by side -> the gated read, [sequence, batch, local]."""
        length, batch, _ = projected.shape
        local = self.heads * self.head_dim
        sizes = [self.inputs * local, local] + [local] * self.gated
        logits = 2 * self.heads * self.static_gates
        fed, q, *gate, static = projected.split([*sizes, logits], dim=-1)
        fed, tail = self._convolve(fed, None if state is None else state.tail)
        parts = fed.chunk(2, -1) if self.inputs == 2 else (fed, fed)
        a, b = (self._by_head(part) for part in parts)
        a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + self.norm_eps)
        eta, alpha = self._gate_logits(static)
        read, memory = memory_scan(
            a, b, normalize(self._by_head(q)), eta, alpha, self._weights(), self.rules,
            None if state is None else state.memory,
        )  # fmt: skip
        if self.read_norm is not None:
            read = F.rms_norm(read, (self.head_dim,), None, self.norm_eps)
            read = read * self.read_norm.to(read.dtype)[:, None]
        read = read.permute(2, 0, 1, 3).reshape(length, batch, local).to(q.dtype)
        if gate:
            read = read * F.silu(gate[0])
        return read, MixerState(tail, memory)

    def _convolve(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution and SiLU; returns also the tail to carry on."""
        window, length = self.convolution.shape[0], x.shape[0]
        if tail is None:
            tail = x.new_zeros(window - 1, *x.shape[1:])
        padded = torch.cat([tail, x])
        mixed = padded[:length] * self.convolution[0]
        for i in range(1, window):
            mixed = torch.addcmul(mixed, padded[i : i + length], self.convolution[i])
        return F.silu(mixed), padded[length:]

    def _by_head(self, x: Tensor) -> Tensor:
        """[sequence, batch, heads * d] -> fp32 [batch, heads, sequence, d]."""
        length, batch, _ = x.shape
        split = x.view(length, batch, self.heads, self.head_dim)
        return split.permute(1, 2, 0, 3).to(_wide(x)).contiguous()

    def _gate_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Static logits of eta and alpha, fp32 [batch, heads, sequence]."""
        wide = _wide(logits)
        eta_bias, alpha_bias = (p.to(wide)[:, None] for p in (self.eta_bias, self.alpha_bias))
        if not self.static_gates:
            shape = (logits.shape[1], self.heads, logits.shape[0])
            return eta_bias.expand(shape), alpha_bias.expand(shape)
        eta, alpha = logits.to(wide).permute(1, 2, 0).chunk(2, dim=1)
        return eta + eta_bias, alpha + alpha_bias

    def _weights(self) -> MemoryWeights | None:
        if not self.modifies_itself:
            return None

        def wide(name: str) -> Any:
            weight = getattr(self, name, None)
            return weight if weight is None else weight.to(_wide(weight))

        return MemoryWeights(
            key=wide("memory_key"),
            value=wide("memory_value"),
            gates=wide("memory_gates"),
            lambda_key=wide("lambda_key"),
            lambda_value=wide("lambda_value"),
            read=wide("memory_read"),
        )


def _wide(x: Tensor) -> torch.dtype:
    """The precision of states and gates: fp32, or that of x where it is more."""
    return torch.promote_types(x.dtype, torch.float32)

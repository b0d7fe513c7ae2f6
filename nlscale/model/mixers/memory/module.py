"""The mixers with a memory: `hope`, `hope-pure`, `hope-paper` and `gated-delta`.

One code path (docs/concepts/memory.md). `gated-delta` is the same with the projections static: no
memory makes k, v and the gates. Heads are split over the tensor-parallel group; the scan is local
to a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, ModelConfig, head_dim
from nlscale.model.init import constant, normal, orthogonal, spread, tag
from nlscale.model.layers import column_linear, recomputed, remade, row_linear
from nlscale.model.mixers.memory.check import inputs_of, scan_errors
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.memory.one_token import MemoryOneToken
from nlscale.model.mixers.memory.state import MixerState
from nlscale.model.mixers.module import Mixer, Way
from nlscale.model.width import width_multiplier
from nlscale.ops import pointwise
from nlscale.ops.check import ScanInputs
from nlscale.ops.documents import Documents
from nlscale.ops.memory.kernels import sizes as fused_scan
from nlscale.ops.memory.rules import MemoryWeights
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.pointwise import compiled_on_gpu, scan_inputs, wide

_GATE_STD = 0.02


class MemoryMixer(Mixer):
    """A memory of one state a head and sequence.

    a, b  = SiLU(convolution(W_a x)), SiLU(convolution(W_b x))     inputs of k and of v
    q     = normalize(W_q x)                                       static queries
    y     = W_o ( RMSNorm(read) * SiLU(W_g x) )                    each if configured
    """

    def __init__(
        self,
        facts: MemoryFacts,
        model: ModelConfig,
        megatron: TransformerConfig,
        residual_std: float,
        recompute: bool,
        kernels: bool,
    ) -> None:
        super().__init__()
        memory, d, tp = model.memory, model.d_model, megatron.tensor_model_parallel_size
        self.heads, self.head_dim = model.heads // tp, head_dim(model)
        self.norm_eps = model.norm_eps
        self.inputs = 2 if memory.separate_inputs else 1
        self.gated = bool(memory.output_gate)
        self.rules = facts.rules(model)
        self.static_gates = bool(memory.static_gates)
        self.recompute, self.kernels = recompute, kernels
        self.scan_inputs = compiled_on_gpu(scan_inputs, kernels)
        self.gated_read = compiled_on_gpu(pointwise.gated_read, kernels)
        local, dtype = self.heads * self.head_dim, megatron.params_dtype
        outputs = [d] * (self.inputs + 1 + self.gated) + [model.heads] * (2 * self.static_gates)
        wider = width_multiplier(model)
        self.project = column_linear(megatron, d, outputs, normal(model.init_std), wider)
        self.output = row_linear(megatron, d, d, normal(residual_std), wider)
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
            tag(self.read_norm, constant(1.0), 0, decays=False)
        else:
            self.register_parameter("read_norm", None)
        self._add_memories(facts, model, dtype)

    def _add_memories(self, facts: MemoryFacts, model: ModelConfig, dtype: torch.dtype) -> None:
        h, n = self.heads, self.head_dim
        self.modifies_itself = facts.modifies_itself
        if not self.modifies_itself:
            return
        self.memory_key = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_value = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_gates = nn.Parameter(torch.empty(h, 2, n, dtype=dtype))
        tag(self.memory_key, orthogonal, 0, matrix=True)
        tag(self.memory_value, orthogonal, 0, matrix=True)
        tag(self.memory_gates, normal(_GATE_STD), 0)
        if facts.main_memory:
            start = float(model.memory.lambda_init or 0.0)
            self.lambda_key = nn.Parameter(torch.empty(h, dtype=dtype))
            self.lambda_value = nn.Parameter(torch.empty(h, dtype=dtype))
            tag(self.lambda_key, constant(start), 0)
            tag(self.lambda_value, constant(start), 0)
        else:
            self.memory_read = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
            tag(self.memory_read, orthogonal, 0, matrix=True)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, MixerState]:
        projected, _ = self.project(x)
        mix = partial(recomputed, self._mix) if self.recompute else self._mix
        read, state = mix(projected, state, documents, lengths)
        return self.output(read)[0], state

    def _mix(
        self,
        projected: Tensor,
        state: MixerState | None,
        documents: Documents | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, MixerState]:
        """Inputs, queries and gates side by side -> the gated read, [sequence, batch, local]."""
        local = self.heads * self.head_dim
        sizes = [self.inputs * local, local] + [local] * self.gated
        logits = 2 * self.heads * self.static_gates
        fed, q, *gate, static = projected.split([*sizes, logits], dim=-1)
        before = self.convolution.shape[0] - 1
        tail = (
            fed.new_zeros(before, *fed.shape[1:]) if state is None else state.tail.transpose(0, 1)
        )
        eta, alpha = self._gate_logits(static)
        if documents is not None:
            eta, alpha = documents.fill(eta), documents.fill(alpha)
        make = partial(self._make_inputs, fed, q, tail, documents)
        a, b, q = make()
        weights = self._weights()
        fused = self.kernels and fused_scan.supports(a, b, q, self.rules, weights is None)
        # What the kernels are fed with is as large as the projection that it is made of.
        kept = remade((a, b, q), make) if fused and not self.recompute else nullcontext()
        with kept:
            read, memory = memory_scan(
                a, b, q, eta, alpha, weights, self.rules,
                None if state is None else state.memory,
                None if documents is None else documents.carried, self.kernels, lengths,
            )  # fmt: skip
        if documents is not None:
            read = documents.take(read)
        read = self.gated_read(read, self.read_norm, gate[0] if gate else None, self.norm_eps)
        return read.to(projected.dtype), MixerState.after(tail, fed, lengths, memory)

    def _make_inputs(
        self, fed: Tensor, q: Tensor, tail: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        position = None if documents is None else documents.position
        a, b, q = self.scan_inputs(
            fed, q, self.convolution, tail, position, self.inputs, self.heads, self.norm_eps
        )
        if documents is None:
            return a, b, q
        return documents.fill(a), documents.fill(b), documents.fill(q)

    def _gate_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Static logits of eta and alpha, fp32 [batch, heads, sequence]."""
        dtype = wide(logits)
        eta_bias, alpha_bias = (p.to(dtype)[:, None] for p in (self.eta_bias, self.alpha_bias))
        if not self.static_gates:
            shape = (logits.shape[1], self.heads, logits.shape[0])
            return eta_bias.expand(shape), alpha_bias.expand(shape)
        eta, alpha = logits.to(dtype).permute(1, 2, 0).chunk(2, dim=1)
        return eta + eta_bias, alpha + alpha_bias

    def _weights(self) -> MemoryWeights | None:
        if not self.modifies_itself:
            return None

        def widened(name: str) -> Any:
            weight = getattr(self, name, None)
            return weight if weight is None else weight.to(wide(weight))

        return MemoryWeights(
            key=widened("memory_key"),
            value=widened("memory_value"),
            gates=widened("memory_gates"),
            lambda_key=widened("lambda_key"),
            lambda_value=widened("lambda_value"),
            read=widened("memory_read"),
        )

    def one_token(self) -> MemoryOneToken:
        return MemoryOneToken(self)

    def projected(self) -> list[str]:
        names = ["k input", "v input"] if self.inputs == 2 else ["k, v input"]
        names += ["query"] + ["output gate"] * self.gated
        return names + ["eta logit", "alpha logit"] * self.static_gates

    @staticmethod
    def ways(
        facts: MemoryFacts,
        model: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Way]:
        given = [inputs_of(facts, model, batch, length, dtype, device)]
        if given[0].path == "kernels":
            given.append(given[0].to(torch.float32, device))

        def way(inputs: ScanInputs) -> Way:
            leaves = [*inputs.leaves.values()]
            return Way(inputs.path, lambda: memory_scan(*inputs.arguments())[0], leaves)

        return [way(inputs) for inputs in given]

    @staticmethod
    def kernel_errors(
        facts: MemoryFacts, config: Config, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, float]]:
        return {"Triton": scan_errors(facts, config, dtype, device)}

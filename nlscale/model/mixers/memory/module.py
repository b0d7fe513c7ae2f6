"""The mixers with a memory: those of Hope, `gated-delta`, and the baselines beside it.

One code path (docs/concepts/memory.md). `gated-delta` is the same with the projections static: no
memory makes k, v and the gates. `deltanet` is that without a decay, `linear-attention` without the
delta rule, and `retnet` without it and with a decay of its own for each head. Heads are split over
the tensor-parallel group; the scan is local to a head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, Decay, GateActivation, ModelConfig, head_dim
from nlscale.model.init import Initializer, constant, normal, orthogonal, settled, spread, tag
from nlscale.model.layers import column_linear, own_heads, recomputed, remade, row_linear
from nlscale.model.mixers.memory.check import inputs_of, scan_errors
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.memory.gates import VECTORS, ChannelGates
from nlscale.model.mixers.memory.one_token import MemoryOneToken
from nlscale.model.mixers.memory.state import MixerState
from nlscale.model.mixers.module import Mixer, OneToken, Way
from nlscale.model.width import width_multiplier
from nlscale.ops import pointwise
from nlscale.ops.check import ScanInputs
from nlscale.ops.documents import Documents
from nlscale.ops.memory.kernels import sizes as fused_scan
from nlscale.ops.memory.rules import MainWeights, MemoryWeights
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.pointwise import compiled_on_gpu, scan_inputs, wide

_GATE_STD = 0.02
_OPEN = 1e4
"""A logit whose sigmoid is 1 without rounding in any precision."""
_MOMENTUM = 2.0
"""Logit of what is left of the momentum of chunks after another one, at the start: 0.88."""


class MemoryMixer(Mixer):
    """A memory of one state a head and sequence.

    a, b  = SiLU(convolution(W_a x)), SiLU(convolution(W_b x))     inputs of k and of v
    q     = normalize(W_q x)                                       static queries
    y     = W_o ( RMSNorm(read) * SiLU(W_g x) )                    each if configured

    The queries may go through the convolution and SiLU too, and the gate be a sigmoid.
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
        self.query_convolution = memory.query_convolution
        self.gated = bool(memory.output_gate)
        self.sigmoid_gate = memory.gate_activation == GateActivation.sigmoid
        self.rules = facts.rules(model)
        self.static_gates = bool(memory.static_gates)
        self.recompute, self.kernels = recompute, kernels
        self.scan_inputs = compiled_on_gpu(scan_inputs, kernels)
        self.gated_read = compiled_on_gpu(pointwise.gated_read, kernels)
        local, dtype = self.heads * self.head_dim, megatron.params_dtype
        self.gates = facts.gates
        of_gates = [model.heads] * len(self.gates)
        if self.rules.channel_gates:
            of_gates = [self.head_dim]
        of_gates = of_gates * self.static_gates
        self.gate_columns = sum(of_gates) // tp
        outputs = [d] * (self.inputs + 1 + self.gated) + of_gates
        wider = width_multiplier(model)
        self.project = column_linear(megatron, d, outputs, normal(model.init_std), wider)
        self.output = row_linear(megatron, d, d, normal(residual_std), wider)
        convolved = self.inputs + self.query_convolution
        self.convolution = nn.Parameter(
            torch.empty(memory.convolution, convolved * local, dtype=dtype)
        )
        tag(self.convolution, normal(memory.convolution**-0.5), 1, [d] * convolved)
        self.channel_gates: ChannelGates | None = None
        if self.rules.channel_gates:
            self.channel_gates = ChannelGates(model, self.heads, self.static_gates, dtype)
        starts = {
            "eta": constant(float(memory.eta_bias or 0.0)),
            "alpha": spread(memory.alpha_bias, 1.0),
        }
        for gate in self.gates if self.channel_gates is None else ():
            bias = nn.Parameter(torch.empty(self.heads, dtype=dtype))
            tag(bias, starts[gate], 0)
            self.register_parameter(f"{gate}_bias", bias)
        self.decay = facts.decay
        if memory.read_norm:
            self.read_norm = nn.Parameter(torch.empty(self.heads, self.head_dim, dtype=dtype))
            tag(self.read_norm, constant(1.0), 0, decays=False)
        else:
            self.register_parameter("read_norm", None)
        self._add_memories(facts, model, dtype)
        self._add_writes(model.memory.alpha_bias, dtype)

    def _add_memories(self, facts: MemoryFacts, model: ModelConfig, dtype: torch.dtype) -> None:
        h, n = self.heads, self.head_dim
        rows = VECTORS * n if self.rules.channel_gates else 2
        self.modifies_itself = facts.modifies_itself
        if not self.modifies_itself:
            return
        self.memory_key = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_value = nn.Parameter(torch.empty(h, n, n, dtype=dtype))
        self.memory_gates = nn.Parameter(torch.empty(h, rows, n, dtype=dtype))
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

    def _add_writes(self, alpha_bias: float, dtype: torch.dtype) -> None:
        """What is learned of how the main memory is written."""
        h, n, rules = self.heads, self.head_dim, self.rules
        made: dict[str, tuple[tuple[int, ...], Initializer, bool]] = {}
        if rules.reads_state:
            made["state_key"] = made["state_value"] = (h, n, n), orthogonal, True
            rows = VECTORS * n if rules.channel_gates else 2
            made["state_gates"] = (h, rows, n), normal(n**-0.5), False
            made["state_weight"] = (h, 3), constant(0.0), False
        if rules.kalman_gain:
            made["noise"] = (h,), settled(alpha_bias, 1.0), False
        if rules.chunk_momentum:
            made["momentum_decay"] = (h,), constant(_MOMENTUM), False
            made["momentum_weight"] = (h,), constant(0.0), False
        for name, (shape, init, matrix) in made.items():
            parameter = nn.Parameter(torch.empty(*shape, dtype=dtype))
            tag(parameter, init, 0, decays=False if name == "state_weight" else None, matrix=matrix)
            self.register_parameter(name, parameter)

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
        queries = [] if self.query_convolution else [local]  # beside what the convolution takes
        fed, *rest = projected.split(
            [
                self.convolution.shape[1],
                *queries,
                *[local] * self.gated,
                self.gate_columns,
            ],
            dim=-1,
        )
        q, gate, static = rest[0] if queries else None, rest[-2] if self.gated else None, rest[-1]
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
                self._main_weights(),
            )  # fmt: skip
        if documents is not None:
            read = documents.take(read)
        read = self.gated_read(read, self.read_norm, gate, self.norm_eps, self.sigmoid_gate)
        return read.to(projected.dtype), MixerState.after(tail, fed, lengths, memory)

    def _make_inputs(
        self, fed: Tensor, q: Tensor | None, tail: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        position = None if documents is None else documents.position
        a, b, q = self.scan_inputs(
            fed, q, self.convolution, tail, position, self.inputs, self.heads, self.norm_eps
        )
        if documents is None:
            return a, b, q
        return documents.fill(a), documents.fill(b), documents.fill(q)

    def _gate_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Static logits of eta and alpha, fp32 [batch, heads, sequence]; of gates of channels as
        `ChannelGates` makes them."""
        if self.channel_gates is not None:
            return self.channel_gates.logits(logits)
        shape = (logits.shape[1], self.heads, logits.shape[0])
        found = {name: bias[:, None].expand(shape) for name, bias in self.gate_biases().items()}
        if self.static_gates and self.gates:
            of_gates = logits.to(wide(logits)).permute(1, 2, 0).chunk(len(self.gates), dim=1)
            for name, given in zip(self.gates, of_gates, strict=True):
                found[name] = given + found[name]
        return found["eta"], found["alpha"]

    def gate_biases(self) -> dict[str, Tensor]:
        """What is added to the logits of eta and alpha, in at least fp32, [heads]; of a gate that
        is not learned, the logit itself."""
        found = {name: self._widened(f"{name}_bias") for name in self.gates}
        like = self.convolution
        dtype, device = wide(like), like.device
        if "eta" not in found:
            found["eta"] = torch.full((self.heads,), _OPEN, dtype=dtype, device=device)
        if self.decay == Decay.none:
            found["alpha"] = torch.full((self.heads,), _OPEN, dtype=dtype, device=device)
        if self.decay == Decay.fixed:
            found["alpha"] = _retained(own_heads(self.heads), dtype, device)
        return found

    def _weights(self) -> MemoryWeights | None:
        if not self.modifies_itself:
            return None

        return MemoryWeights(
            key=self._widened("memory_key"),
            value=self._widened("memory_value"),
            gates=self._widened("memory_gates"),
            lambda_key=self._widened("lambda_key"),
            lambda_value=self._widened("lambda_value"),
            read=self._widened("memory_read"),
        )

    def _main_weights(self) -> MainWeights:
        return MainWeights(**{f.name: self._widened(f.name) for f in fields(MainWeights)})

    def _widened(self, name: str) -> Any:
        weight = getattr(self, name, None)
        return weight if weight is None else weight.to(wide(weight))

    def one_token(self) -> OneToken:
        return OneToken(self) if self.rules.serial else MemoryOneToken(self)

    def projected(self) -> list[str]:
        names = ["k input", "v input"] if self.inputs == 2 else ["k, v input"]
        names += ["query"] + ["output gate"] * self.gated
        gates = [f"{gate} logit" for gate in self.gates]
        if self.channel_gates is not None:
            gates = ["gate input"]
        return names + gates * self.static_gates

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
            return Way(inputs.path, lambda: _scanned(inputs), leaves)

        return [way(inputs) for inputs in given]

    @staticmethod
    def kernel_errors(
        facts: MemoryFacts, config: Config, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, float]]:
        return {"Triton": scan_errors(facts, config, dtype, device)}


@lru_cache(maxsize=16)
def _retained(heads: range, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits of the decays 1 - 2^(-5 - head), as in RetNet (Sun et al. 2023)."""
    logits = [math.log(2 ** (5 + head) - 1) for head in heads]
    return torch.tensor(logits, dtype=dtype, device=device)


def _scanned(inputs: ScanInputs) -> Tensor:
    return partial(memory_scan, main=inputs.main())(*inputs.arguments())[0]

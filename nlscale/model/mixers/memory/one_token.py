"""One token of every row through a mixer with a memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.model.mixers.memory.state import MixerState
from nlscale.model.mixers.module import OneToken
from nlscale.ops.by_hand import wide
from nlscale.ops.memory.step import MemoryStep, advance
from nlscale.ops.one_token import RMSNorm, unit


class MemoryOneToken(OneToken):
    """What `MemoryMixer` computes, by the recurrence and on a state that is written in place."""

    capturable = True

    def __init__(self, mixer: Any) -> None:
        """Of a `MemoryMixer` that holds all heads."""
        super().__init__(mixer)
        self.project, self.output = mixer.project.weight.mT, mixer.output.weight.mT
        self.heads, self.inputs, size = mixer.heads, mixer.inputs, mixer.head_dim
        local = mixer.heads * size
        self.static = bool(mixer.static_gates)
        self.gated = bool(mixer.gated)
        self.activation = torch.sigmoid if mixer.sigmoid_gate else F.silu
        self.convolved = mixer.inputs + mixer.query_convolution
        queries = 1 - mixer.query_convolution
        self.sizes = [self.convolved * local, local * queries, *[local] * self.gated, -1]
        self.gates = len(mixer.gates)
        self.sizes[-1] = self.gates * mixer.heads * self.static
        # logits of one learned gate stand in the place of both
        self.beside = [int(gate not in mixer.gates) for gate in ("eta", "alpha")]
        self.dtype = dtype = wide(self.project)
        self.convolution = mixer.convolution.to(dtype)
        bias = mixer.gate_biases()
        self.bias = torch.stack([bias["eta"], bias["alpha"]], 1).to(dtype)
        self.input_norm, self.unit = RMSNorm(size, mixer.norm_eps, None, dtype), unit(dtype)
        norm = mixer.read_norm
        self.read_norm = None if norm is None else RMSNorm(size, mixer.norm_eps, norm, dtype)
        self.step = MemoryStep(mixer._weights(), mixer.rules, dtype)

    def __call__(
        self, x: Tensor, state: MixerState, active: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        batch, heads = len(x), self.heads
        if active is not None:
            active = active.to(x.device)
        fed, q, *gate, static = torch.mm(x, self.project).split(self.sizes, dim=-1)
        mixed = self._convolved(fed, state.tail, active).view(batch, self.convolved, heads, -1)
        a_b = torch.stack([self.input_norm(mixed[:, 0]), mixed[:, self.inputs - 1]], 2)
        q = self.unit(mixed[:, -1] if self.convolved > self.inputs else q.view(batch, heads, -1))
        gates = self.bias.expand(batch, heads, 2)
        if self.static and self.gates:
            logits = static.view(batch, self.gates, heads).mT
            gates = gates + (logits if self.gates == 2 else F.pad(logits, self.beside))
        read = self.step(a_b, q, gates, state.memory, active)
        if self.read_norm is not None:
            read = self.read_norm(read)
        read = read.reshape(batch, -1)
        if self.gated:
            read.mul_(self.activation(gate[0].to(self.dtype)))
        return torch.mm(read.to(x.dtype), self.output), state

    def _convolved(self, fed: Tensor, tail: Tensor, active: Tensor | None) -> Tensor:
        """SiLU of the convolution at the token, [batch, channels]; the tail moves on by it."""
        window = torch.cat([tail, fed[:, None]], 1)
        moved = window[:, 1:]
        tail.copy_(moved if active is None else torch.where(active[:, None, None], moved, tail))
        return F.silu((window * self.convolution).sum(1), inplace=True)

    def advance(self, state: MixerState, active: Tensor | None) -> None:
        advance(state.memory, self.step.rules.chunk, active)

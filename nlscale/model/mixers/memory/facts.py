"""What a mixer with a memory takes: parameters, FLOPs, and what its backward pass needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from nlscale.config.vocabulary import (
    Config,
    Decay,
    GateActivation,
    MemoryGain,
    MemoryGates,
    MemoryWrite,
    ModelConfig,
    head_dim,
)
from nlscale.errors import UserError
from nlscale.model.mixers.facts import FP32, PASSES, MicroBatch, MixerFacts, element_bytes
from nlscale.model.mixers.memory.keys import (
    SERIAL,
    convolved,
    gate_rows,
    inputs,
    sections,
    serial_keys,
)
from nlscale.ops.memory.kernels.sizes import takes
from nlscale.ops.memory.rules import MemoryRules


@dataclass(frozen=True)
class MemoryFacts(MixerFacts):
    """A memory, self-modifying or not (docs/concepts/memory.md); `model.memory` says the rest."""

    made_by = "nlscale.model.mixers.memory.module:MemoryMixer"
    plain_by = "nlscale.model.mixers.memory.plain:PlainMemory"
    core = "memory"
    logit_bytes = FP32

    modifies_itself: bool
    """Memories of its own make k, v and the gates; else projections alone do."""
    main_memory: bool
    """The main memory is a state of its own, S, beside which k and v have a static part; else it is
    read off the transfer matrix Pi."""
    erases: bool = True
    """A write erases what is stored along its key, by a learned strength; else it adds as it is."""
    decay: Decay = Decay.learned

    @property
    def gates(self) -> tuple[str, ...]:
        """Those that are learned: the write strength eta and the decay alpha."""
        learned = {"eta": self.erases, "alpha": self.decay == Decay.learned}
        return tuple(name for name, is_learned in learned.items() if is_learned)

    def check(self, model: ModelConfig) -> None:
        """Refuse a memory of which something is not said: no null means anything by itself."""
        for f in fields(model.memory):
            if getattr(model.memory, f.name) is None:
                raise UserError(
                    f"model.memory.{f.name} is null, and model.mixer={model.mixer} has no preset "
                    f"for it; give it a value"
                )
        memory = model.memory
        if memory.strength > 1 and memory.write != MemoryWrite.decayed:
            raise UserError(
                f"model.memory.strength={memory.strength} with model.memory.write=undecayed may "
                f"leave alpha - {memory.strength} of the state along a key, which explodes; set "
                f"model.memory.write=decayed"
            )
        if memory.gates == MemoryGates.channel and memory.write != MemoryWrite.decayed:
            raise UserError(
                f"model.memory.gates=channel is a form of the write that erases what has decayed, "
                f"and model.memory.write={memory.write.value}; set model.memory.write=decayed"
            )
        if memory.gates == MemoryGates.channel and memory.gain == MemoryGain.kalman:
            raise UserError(
                "model.memory.gain=kalman reckons with one decay a head, and "
                "model.memory.gates=channel has one a channel; leave one of the two out"
            )
        if not self.erases and memory.write != MemoryWrite.undecayed:
            raise UserError(
                f"model.memory.write={memory.write.value} says what a write erases, and "
                f"model.mixer={model.mixer} erases nothing; leave it out"
            )
        if self.rules(model).serial and len(self.gates) < 2:
            raise UserError(
                f"model.memory.{', '.join(serial_keys(model))}: this is for memories that learn "
                f"both what they erase and how they decay, and model.mixer={model.mixer} does not; "
                f"use hope or gated-delta"
            )
        if self.rules(model).serial and not self.main_memory:
            raise UserError(
                f"model.memory.{', '.join(serial_keys(model))}: this is how a main memory of its "
                f"own is written, and model.mixer={model.mixer} has none; use hope or gated-delta"
            )

    def rules(self, model: ModelConfig) -> MemoryRules:
        """Those of the scan."""
        memory = model.memory
        return MemoryRules(
            chunk=memory.chunk,
            anchored=bool(memory.anchored),
            c=float(memory.c or 0.0),
            normalize_value=bool(memory.normalize_value),
            main_memory=self.main_memory,
            erases=self.erases,
            decayed_write=memory.write == MemoryWrite.decayed,
            strength=float(memory.strength),
            reads_state=memory.reads_state,
            kalman_gain=memory.gain == MemoryGain.kalman,
            chunk_momentum=memory.chunk_momentum,
            channel_gates=memory.gates == MemoryGates.channel,
        )

    def plain_options(self, model: ModelConfig) -> dict[str, Any]:
        if self.rules(model).serial:
            raise UserError(
                f"a memory with model.memory.{', '.join(serial_keys(model))} says nothing in "
                f"plain torch, of which models for Hugging Face are made; export with --to "
                f"safetensors"
            )
        memory = {
            f.name: _plain(getattr(model.memory, f.name))
            for f in fields(model.memory)
            if f.name not in SERIAL
        }
        kind: dict[str, Any] = {
            "modifies_itself": self.modifies_itself,
            "main_memory": self.main_memory,
        }
        if len(self.gates) < 2:
            kind |= {"erases": self.erases, "decay": self.decay.value}
        return {"heads": model.heads, **memory, **kind}

    def parameters(self, model: ModelConfig) -> int:
        d, h, n, memory = model.d_model, model.heads, head_dim(model), model.memory
        fed = inputs(model)
        total = d + (fed + 1) * d * d + d * d  # norm, inputs, queries, output projection
        total += convolved(model) * d * memory.convolution
        total += d * d if memory.output_gate else 0
        total += d if memory.read_norm else 0
        if memory.gates == MemoryGates.channel:
            total += (1 + 3) * d * n if memory.static_gates else 0  # down to n, up to the channels
            total += 3 * d  # their biases
        else:
            total += len(self.gates) * h * d if memory.static_gates else 0
            total += len(self.gates) * h
        rows = gate_rows(model)
        if self.modifies_itself:
            total += h * (2 * n * n + rows * n)  # M_k, M_v, m_eta, m_alpha
            total += 2 * h if self.main_memory else h * n * n  # lambdas, or M_m
        if memory.reads_state:
            total += h * (2 * n * n + rows * n + 3)  # W of k, of v and of the gates, and gammas
        total += h * (memory.gain == MemoryGain.kalman)  # omega
        return total + 2 * h * memory.chunk_momentum  # beta and gamma

    def matrices(self, model: ModelConfig) -> dict[tuple[int, int], int]:
        d, n, memory = model.d_model, head_dim(model), model.memory
        found = {(d, d): sections(model) + 1}
        if memory.static_gates and memory.gates == MemoryGates.channel:
            for shape, number in (((n, d), 1), ((d, n), 3)):
                found[shape] = found.get(shape, 0) + number
        elif memory.static_gates and self.gates:
            found[model.heads, d] = found.get((model.heads, d), 0) + len(self.gates)
        if self.modifies_itself:
            each = 2 if self.main_memory else 3
            found[n, n] = found.get((n, n), 0) + each * model.heads
        if memory.reads_state:
            found[n, n] = found.get((n, n), 0) + 2 * model.heads
        return found

    def shared(self, model: ModelConfig) -> dict[str, int]:
        if model.memory.gates != MemoryGates.channel or not model.memory.static_gates:
            return {}
        return {"model.memory.gates=channel: a head's size": head_dim(model)}

    def state_bytes(self, config: Config) -> int:
        """Pi now and at the start of the chunk, S, what is off by default keeps, all in fp32, and
        the last inputs of the convolution."""
        model, memory, n = config.model, config.model.memory, head_dim(config.model)
        squares = 2 * self.modifies_itself + self.main_memory
        squares += memory.reads_state + 2 * memory.chunk_momentum
        numbers = model.heads * (squares * n * n + (memory.gain == MemoryGain.kalman))
        tail = convolved(model) * model.d_model * (memory.convolution - 1)
        return FP32 * numbers + tail * element_bytes(config)

    def flops(self, config: Config) -> dict[str, float]:
        model, memory = config.model, config.model.memory
        columns = sections(model) * model.d_model
        columns += self._gate_columns(model)
        if memory.gates == MemoryGates.channel:  # up again, to the channels of all three
            columns += 3 * self._gate_columns(model)
        columns += model.d_model  # the output's
        channels = convolved(model) * model.d_model
        return {
            "projections": float(PASSES * 2 * model.d_model * columns),
            "convolution": float(PASSES * 2 * memory.convolution * channels),
            "memory": model.heads * self._head_flops(config),
        }

    def _head_flops(self, config: Config) -> float:
        """The memory of one head, a token."""
        model, length = config.model, config.data.sequence_length
        chunk, d = model.memory.chunk, head_dim(model)
        whole, rest = divmod(length, chunk)
        gates = gate_rows(model)
        flops: float = whole * self._chunk_flops(d, chunk, gates) + (
            self._chunk_flops(d, rest, gates) if rest else 0
        )
        read_off = PASSES * 2 * d**2 * (not self.main_memory)  # M_m times what is read
        if model.memory.reads_state:
            # off S; what that makes of k, v and the gates
            read_off += PASSES * 2 * d * (3 * d + gate_rows(model))
        return flops / length + read_off

    def _gate_columns(self, model: ModelConfig) -> int:
        """Outputs of the projection that the static logits of the gates are, or are made of."""
        if not model.memory.static_gates:
            return 0
        if model.memory.gates == MemoryGates.channel:
            return head_dim(model)
        return len(self.gates) * model.heads

    def _chunk_flops(self, d: int, size: int, gates: int) -> int:
        """One chunk of `size` tokens of one head, in the notation of `nlscale.ops.memory.chunk`;
        `gates` are the rows of a memory that makes them."""
        rows = d * (self.main_memory + self.modifies_itself)
        products = size * rows * d  # Z' = ... + D^T n
        products += 2 * size * size * d + size * d * d  # the read: q k^T, A D, q Z^T
        if self.erases:
            products += size * size * (d + rows)  # k k^T, T diag(r) X
        if self.main_memory and self.erases:
            products += size * d * d  # f Z^T
        if self.modifies_itself:
            products += d * d * (d + gates) + d**3  # what makes keys with gates, and values, now
            products += size * d * (d + gates) + size * d * d  # keys with gates; values
            products += size * d * d  # (u - c k - f) P^T
        # T, forward only: its derivative is made of products with T
        inverse = size**3 * self.erases
        decays = (
            2 * size * (size + 1)
        )  # derivatives of the decays are summed by a product, backward
        return PASSES * 2 * products + inverse + decays

    def fused(self, batch: MicroBatch) -> bool:
        """Whether the scan runs through the kernels."""
        model = batch.config.model
        static = not self.modifies_itself
        return batch.half_kernels and takes(self.rules(model), head_dim(model), static)

    def serial_programs(self, batch: MicroBatch) -> int | None:
        return batch.rows * batch.heads if self.fused(batch) else None

    def advice(self, batch: MicroBatch) -> list[str]:
        model = batch.config.model
        off = replace(
            self.rules(model), erases=True, reads_state=False, kalman_gain=False,
            chunk_momentum=False, channel_gates=False,
        )  # fmt: skip
        could = batch.half_kernels and takes(off, head_dim(model), not self.modifies_itself)
        if self.fused(batch) or not could:
            return []
        keys = ", ".join(serial_keys(model))
        what = f"model.memory.{keys}" if keys else f"model.mixer={model.mixer}"
        return [
            f"no kernel knows {what}: on GPUs the memory runs as torch operations, many times "
            f"slower"
        ]

    def kept(self, batch: MicroBatch, recompute: bool) -> float:
        model, memory = batch.config.model, batch.config.model.memory
        gates = self._gate_columns(model) // batch.config.parallel.tensor
        projected = sections(model) * batch.channels + batch.tokens * gates * batch.element
        kept = batch.residual + batch.channels  # the inputs of both projections
        if recompute:
            return kept + projected
        # a view of the projection keeps all of it
        silu = memory.gate_activation == GateActivation.silu  # needs its input, sigmoid does not
        by_view = batch.compiled or (bool(memory.output_gate) and silu)
        return kept + projected * by_view + self._mixed(batch)

    def transient(self, batch: MicroBatch, recompute: bool) -> float:
        gradients = self._scan_gradients(batch)
        return max(
            gradients if self.fused(batch) or self.rules(batch.config.model).serial else 0.0,
            self._mixed(batch) + gradients if recompute else 0.0,
        )

    def _mixed(self, batch: MicroBatch) -> float:
        """Kept between the projected inputs and the read."""
        return self._around_the_scan(batch) + self._makers(batch) + self._scan(batch)

    def _around_the_scan(self, batch: MicroBatch) -> float:
        """Convolution, norms and gate; norms are taken in fp32."""
        memory, fed = batch.config.model.memory, inputs(batch.config.model)
        mixed = convolved(batch.config.model)
        channels, scalars = batch.tokens * batch.width, batch.tokens * batch.heads
        tail = mixed * batch.rows * (memory.convolution - 1) * batch.width
        if batch.compiled:
            # the tail and the read; the projection counts where it is made
            return batch.element * (tail + channels)
        # inputs of the convolution and of the SiLU
        kept = batch.element * (2 * mixed * channels + tail)
        # a and q before they are normalised; where b is what a was made of, it counts as b
        same = fed == 1 and batch.element == FP32
        kept += FP32 * ((1 if same else 2) * channels + 2 * scalars)
        if memory.read_norm:
            kept += batch.element * 2 * channels + FP32 * scalars
        if memory.output_gate:
            kept += batch.element * 2 * channels  # the read and the SiLU of its gate
        return kept

    def _makers(self, batch: MicroBatch) -> float:
        """The learned memories, as the scan wants them."""
        d, fused, kept = head_dim(batch.config.model), self.fused(batch), 0.0
        if not self.modifies_itself:
            return kept
        if fused:
            kept += batch.element * batch.heads * (2 * d + 2) * d
        elif not self.rules(batch.config.model).serial:  # which takes them as they are
            # [M_k; m_eta; m_alpha] and M_v, once a sequence
            kept += FP32 * batch.rows * batch.heads * (2 * d + 2) * d
        if not self.main_memory:
            # M_m times the read
            number = batch.element if fused else FP32
            own = 1 if fused else batch.rows
            kept += number * (batch.tokens * batch.width + own * batch.heads * d * d)
        elif batch.element < FP32:
            kept += FP32 * 2 * batch.heads * d * d  # M_k and M_v, to be weighted in fp32
            if batch.config.model.memory.gates == MemoryGates.channel:
                kept += FP32 * batch.heads * 3 * d * d  # and what makes the gates
        return kept

    def _scan(self, batch: MicroBatch) -> float:
        model, length = batch.config.model, batch.config.data.sequence_length
        chunk, d = model.memory.chunk, head_dim(model)
        if self.fused(batch):
            # static logits, the states at the start of chunks, and a, b and q where a rest of a
            # chunk cuts them in two; else they are made again
            cut = length > chunk and length % chunk > 0
            states = self.modifies_itself + self.main_memory
            chunks = batch.rows * batch.heads * -(-length // chunk)
            kept = batch.element * (
                3.0 * cut * batch.tokens * batch.width + states * chunks * d * d
            )
            return kept + 2 * FP32 * batch.tokens * batch.heads
        kept = 0.0
        sequences = batch.rows * batch.heads
        if self.rules(model).serial:
            return FP32 * sequences * self._begins(model, length) + self._widened(batch)
        whole, rest = divmod(length, chunk)
        for count, size in ((whole, chunk), (1, rest)):
            if count * size:
                kept += FP32 * sequences * self._chunks(model, count, size)
        return kept

    def _begins(self, model: ModelConfig, length: int) -> int:
        """Numbers that `SerialRun` keeps of one sequence: tokens, and what each chunk begins
        with."""
        memory, d = model.memory, head_dim(model)
        states = d * d * (self.modifies_itself + 1 + memory.chunk_momentum)
        states += memory.gain == MemoryGain.kalman
        whole, rest = divmod(length, memory.chunk)
        return length * (3 * d + gate_rows(model)) + (whole + bool(rest)) * states

    def _widened(self, batch: MicroBatch) -> float:
        """Weights of the scan in fp32, where they are not."""
        d, memory = head_dim(batch.config.model), batch.config.model.memory
        if batch.element == FP32:
            return 0.0
        rows = gate_rows(batch.config.model)
        each = memory.reads_state * (2 * d * d + rows * d + 3) + 2 * memory.chunk_momentum
        each += memory.gain == MemoryGain.kalman
        return FP32 * batch.heads * each

    def _chunks(self, model: ModelConfig, count: int, size: int) -> int:
        """Numbers that `ChunkWrites` and `ChunkReads` keep of equal chunks of one sequence."""
        memory, d = model.memory, head_dim(model)
        # the states: Pi, S or both
        rows = d * (self.modifies_itself + self.main_memory)
        kept = 4 * size * d  # a, b, q, k
        kept += 2 * (size + 1) + (size + 1) * size  # decays: g, its exp, F
        kept += (1 + self.erases) * size * size  # the scores; the inverse of the system
        kept += size * rows + rows * d  # writes, states
        kept += size * (1 + 1 + 2)  # 1 / |x|, write strengths, logits of the gates
        if self.modifies_itself:
            kept += (2 * d + 2) * d + size * d  # what makes keys, values and gates now; v
            kept += size * bool(memory.normalize_value)
        return count * kept + rows * d  # the state after the last chunk

    def _scan_gradients(self, batch: MicroBatch) -> float:
        """What the backward pass of the scan has at once."""
        model = batch.config.model
        states = head_dim(model) / model.memory.chunk
        if self.rules(model).serial:
            # gradients of a, b and q, in parts and joined; one chunk, made again
            d, size = head_dim(model), min(model.memory.chunk, batch.config.data.sequence_length)
            again, parts = 12 * size * d + 8 * size * size + 8 * d * d, 6.0
            if model.memory.gates == MemoryGates.channel:
                # gradients of the gates, too; pairs of tokens, in runs that double
                again += round(2.5 * math.log2(size) * size * d) - 2 * size * size
                parts = 9.0
            return FP32 * (parts * batch.tokens * batch.width + batch.rows * batch.heads * again)
        if not self.fused(batch):
            # gradients of k, of the writes, of a, and of the states
            return FP32 * batch.tokens * batch.width * (3 + states)
        solve, main = 1 / states, self.main_memory
        # a, b, q, keys, writes, gradients of q, of k and of the writes; the states', the inverses
        tiles = 8 + states + solve
        if main:
            tiles += 2 + states  # what S decides of the writes, gradient of v and of S after
        if self.modifies_itself:
            tiles += 6 + main  # v, what Pi writes, gradients of x, v, a and b
        return batch.channels * tiles


def _plain(value: Any) -> Any:
    """A name as text, and all else as it is."""
    return value.value if isinstance(value, Enum) else value

"""Bytes that the backward pass needs, kept by the forward pass of one micro batch on one rank.

Written down from what `nlscale.model` and `nlscale.ops` do on a GPU; tests/plan compares it with
what autograd really saves. Tensors count with the whole of their storage, because a view keeps
all of it: a gate is a part of the projection, and keeps the projection. With `train.kernels` small
operations that follow each other keep what they begin with and nothing between them.

A few numbers a layer that do not grow with the batch or the sequence are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config import CmsForm, Config, Dtype, Mixer, Recompute
from nlscale.model.sizes import head_dim, level_hidden
from nlscale.ops.triton import takes

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class MicroBatch:
    """What one micro batch takes on one tensor-parallel rank."""

    config: Config
    vocabulary: int

    @property
    def rows(self) -> int:
        return self.config.train.micro_batch

    @property
    def tokens(self) -> int:
        return self.rows * self.config.data.sequence_length

    @property
    def element(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.config.train.dtype == Dtype.bf16 else _FP32

    @property
    def width(self) -> int:
        """Channels of the mixer on this rank."""
        return self.config.model.d_model // self.config.parallel.tensor

    @property
    def heads(self) -> int:
        return self.config.model.heads // self.config.parallel.tensor

    @property
    def residual(self) -> float:
        """The residual stream once: split along the sequence where `parallel.sequence` is set."""
        return self._own_tokens * self.config.model.d_model * self.element

    @property
    def _own_tokens(self) -> float:
        parallel = self.config.parallel
        return self.tokens / (parallel.tensor if parallel.sequence else 1)

    def block(self) -> float:
        """Kept by one block."""
        recompute = self.config.train.recompute
        kept = self._norm() + self._mixer(Recompute.mixer in recompute)
        return kept + self._cms(Recompute.cms in recompute)

    def embedding(self) -> float:
        """Kept by the embedding: the token ids."""
        return self.tokens * _INT64

    def head(self) -> float:
        """Kept by the last norm, the head and the cross entropy: the logits, once."""
        rows = self.tokens * (_INT64 + _FP32)  # target and log-sum-exp of each
        return self._norm() + self.residual + self._logits * self.element + rows

    @property
    def _logits(self) -> float:
        return self.tokens * self.vocabulary / self.config.parallel.tensor

    def gathered(self) -> float:
        """megatron-core's buffer, for all micro batches, in which a split sequence is gathered."""
        model, parallel = self.config.model, self.config.parallel
        return self.tokens * model.d_model * self.element if parallel.sequence else 0

    def transient(self) -> float:
        """The largest of what exists for a moment only, beside all that is kept.

        The backward pass of a scan, or a part of one block while it is computed again. The gradient
        of the logits takes their own place.
        """
        recompute = self.config.train.recompute
        parts = [self._scan_gradients() if self._fused_scan else 0.0]
        if Recompute.mixer in recompute:
            parts.append(self._mixed() + self._scan_gradients())
        if Recompute.cms in recompute:
            parts.append(max(self._hidden(h) for h in self._level_hidden()))
        if self._mixes_levels:
            # what each level adds to the residual stream, once by itself and once stacked
            levels = len(self.config.levels.spectrum)
            parts.append(2 * levels * self.tokens * self.config.model.d_model * self.element)
        return max(parts)

    def _scan_gradients(self) -> float:
        """What the backward pass of the scan has at once."""
        model = self.config.model
        if model.mixer == Mixer.attention:
            return 0.0
        states = head_dim(model) / model.memory.chunk
        if not self._fused_scan:
            # gradients of k, of the writes, of a, and of the states
            return _FP32 * self.tokens * self.width * (3 + states)
        solve, main = 1 / states, self._main_memory
        # a, b, q, keys, writes, gradients of q, of k and of the writes; the states', the inverses
        tiles = 8 + states + solve
        if main:
            tiles += 2 + states  # what S decides of the writes, gradient of v and of S after
        if self._modifies_itself:
            tiles += 6 + main  # v, what Pi writes, gradients of x, v, a and b
        return self.element * self.tokens * self.width * tiles

    def _norm(self) -> float:
        """RMSNorm keeps its input and the inverse root of each token."""
        return self.residual + self._own_tokens * _FP32

    def _mixer(self, recompute: bool) -> float:
        """The mixer, from the normalised input on: projections in, what lies between, and out."""
        model, channels = self.config.model, self.tokens * self.width * self.element
        memory = model.memory
        if model.mixer == Mixer.attention:
            projected, kept_by_view = 3 * channels, True  # the values are a view of it
        else:
            sections = (2 if memory.separate_inputs else 1) + 1 + bool(memory.output_gate)
            gates = 2 * self.heads if memory.static_gates else 0
            projected = sections * channels + self.tokens * gates * self.element
            kept_by_view = self._compiled or bool(memory.output_gate)
        kept = self.residual + channels  # the inputs of both projections
        if recompute:
            return kept + projected
        return kept + projected * kept_by_view + self._mixed()

    def _mixed(self) -> float:
        """Between the projected inputs and the read."""
        if self.config.model.mixer == Mixer.attention:
            return self._attention()
        return self._memory()

    def _attention(self) -> float:
        """Rotated q and k, the output, and its log-sum-exp; v is a view of the projection."""
        kept = 3 * self.tokens * self.width * self.element + self.tokens * self.heads * _FP32
        angles = self.config.data.sequence_length * head_dim(self.config.model) // 2
        return kept + (0 if self._compiled else 4 * angles * _FP32)  # cos and sin, for q and for k

    @property
    def _compiled(self) -> bool:
        return self.config.train.kernels

    @property
    def _modifies_itself(self) -> bool:
        return self.config.model.mixer != Mixer.gated_delta

    @property
    def _main_memory(self) -> bool:
        """Whether S is a state of its own."""
        return self.config.model.mixer in (Mixer.hope, Mixer.gated_delta)

    @property
    def _fused_scan(self) -> bool:
        """Whether the scan runs through the kernels."""
        config, memory = self.config, self.config.model.memory
        bf16 = config.train.kernels and config.train.dtype == Dtype.bf16
        anchored, static = bool(memory.anchored), not self._modifies_itself
        return bf16 and takes(memory.chunk, head_dim(config.model), anchored, static)

    def _memory(self) -> float:
        """The memory mixers."""
        return self._around_the_scan() + self._makers() + self._scan()

    def _around_the_scan(self) -> float:
        """Convolution, norms and gate; norms are taken in fp32."""
        memory = self.config.model.memory
        inputs = 2 if memory.separate_inputs else 1
        channels, scalars = self.tokens * self.width, self.tokens * self.heads
        tail = inputs * self.rows * (memory.convolution - 1) * self.width
        if self._compiled:
            # the tail and the read; the projection counts where it is made
            return self.element * (tail + channels)
        # inputs of the convolution and of the SiLU
        kept = self.element * (2 * inputs * channels + tail)
        # a and q before they are normalised; where b is what a was made of, it counts as b
        same = inputs == 1 and self.element == _FP32
        kept += _FP32 * ((1 if same else 2) * channels + 2 * scalars)
        if memory.read_norm:
            kept += self.element * 2 * channels + _FP32 * scalars
        if memory.output_gate:
            kept += self.element * 2 * channels  # the read and the SiLU of its gate
        return kept

    def _makers(self) -> float:
        """The learned memories, as the scan wants them."""
        model, d, kept = self.config.model, head_dim(self.config.model), 0.0
        if not self._modifies_itself:
            return kept
        if not self._fused_scan:
            # [M_k; m_eta; m_alpha] and M_v, once a sequence
            kept += _FP32 * self.rows * self.heads * (2 * d + 2) * d
        else:
            kept += self.element * self.heads * (2 * d + 2) * d
        if model.mixer != Mixer.hope:
            # M_m times the read
            number = self.element if self._fused_scan else _FP32
            own = 1 if self._fused_scan else self.rows
            kept += number * (self.tokens * self.width + own * self.heads * d * d)
        elif self.element < _FP32:
            kept += _FP32 * 2 * self.heads * d * d  # M_k and M_v, to be weighted in fp32
        return kept

    def _scan(self) -> float:
        model = self.config.model
        memory, d, length = model.memory, head_dim(model), self.config.data.sequence_length
        if self._fused_scan:
            # static logits, the states at the start of chunks, and a, b and q where a rest of a
            # chunk cuts them in two; else they are made again
            cut = length > memory.chunk and length % memory.chunk > 0
            states = self._modifies_itself + self._main_memory
            chunks = self.rows * self.heads * -(-length // memory.chunk)
            kept = self.element * (3.0 * cut * self.tokens * self.width + states * chunks * d * d)
            return kept + 2 * _FP32 * self.tokens * self.heads
        kept = 0.0
        sequences = self.rows * self.heads
        whole, rest = divmod(length, memory.chunk)
        for count, size in ((whole, memory.chunk), (1, rest)):
            if count * size:
                kept += _FP32 * sequences * self._chunks(count, size)
        return kept

    def _chunks(self, count: int, size: int) -> int:
        """Numbers that `ChunkWrites` and `ChunkReads` keep of equal chunks of one sequence."""
        model = self.config.model
        memory, d = model.memory, head_dim(model)
        modifies_itself = self._modifies_itself
        # the states: Pi, S or both
        rows = d * (modifies_itself + self._main_memory)
        kept = 4 * size * d  # a, b, q, k
        kept += 2 * (size + 1) + (size + 1) * size  # decays: g, its exp, F
        kept += 2 * size * size  # the inverse of the triangular system; the scores
        kept += size * rows + rows * d  # writes, states
        kept += size * (1 + 1 + 2)  # 1 / |x|, write strengths, logits of the gates
        if modifies_itself:
            kept += (2 * d + 2) * d + size * d  # what makes keys, values and gates now; v
            kept += size * bool(memory.normalize_value)
        return count * kept + rows * d  # the state after the last chunk

    def _cms(self, recompute: bool) -> float:
        """The MLPs of a block, from the residual stream on, with their norms."""
        widths, model = self._level_hidden(), self.config.model
        channels = self.tokens * self.element
        if self._mixes_levels:
            # one norm; its output is gathered once for all levels
            kept = self._norm() + channels * model.d_model
        else:
            kept = len(widths) * (self._norm() + self.residual)
        for hidden in widths:
            # the input of the down projection; where levels are mixed, also before its weight
            kept += (2 if self._mixes_levels else 1) * channels * hidden
            kept += 0 if recompute else self._hidden(hidden)
        return kept

    @property
    def _mixes_levels(self) -> bool:
        model = self.config.model
        return model.cms == CmsForm.independent and len(self.config.levels.spectrum) > 1

    def _hidden(self, hidden: int) -> float:
        """SwiGLU of that many hidden units: the up projection, and the SiLU of its gate."""
        return (2.0 if self._compiled else 3.0) * self.tokens * self.element * hidden

    def _level_hidden(self) -> list[int]:
        return [h // self.config.parallel.tensor for h in level_hidden(self.config)]

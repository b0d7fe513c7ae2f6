"""Bytes that the backward pass needs, kept by the forward pass of one micro batch on one rank.

Written down from what `nlscale.model` and `nlscale.ops` do on a GPU; tests/plan compares it with
what autograd really saves. Tensors count with the whole of their storage, because a view keeps
all of it: a gate is a part of the projection, and keeps the projection.

A few numbers a layer that do not grow with the batch or the sequence are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config import CmsForm, Config, Dtype, Mixer, Recompute
from nlscale.model.sizes import head_dim, level_hidden

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
        """Kept by the last norm, the head and the cross entropy: the softmax in fp32."""
        softmax = self._logits * _FP32
        targets = self.tokens * (_INT64 + 1)  # where each is in this rank's part, and whether
        return self._norm() + self.residual + softmax + targets

    @property
    def _logits(self) -> float:
        return self.tokens * self.vocabulary / self.config.parallel.tensor

    def gathered(self) -> float:
        """megatron-core's buffer, for all micro batches, in which a split sequence is gathered."""
        model, parallel = self.config.model, self.config.parallel
        return self.tokens * model.d_model * self.element if parallel.sequence else 0

    def transient(self, last: bool) -> float:
        """The largest of what exists for a moment only, beside all that is kept.

        A part of one block while it is computed again; on the last stage also the logits, or their
        gradient, beside their softmax in fp32.
        """
        recompute = self.config.train.recompute
        parts = [0.0]
        if Recompute.mixer in recompute:
            parts.append(self._mixed() + self._scan_gradients())
        if Recompute.cms in recompute:
            parts.append(max(self._hidden(h) for h in self._level_hidden()))
        if self._mixes_levels:
            # what each level adds to the residual stream, once by itself and once stacked
            levels = len(self.config.levels.spectrum)
            parts.append(2 * levels * self.tokens * self.config.model.d_model * self.element)
        if last:
            parts.append(self._logits * self.element if self.element < _FP32 else 0.0)
        return max(parts)

    def _scan_gradients(self) -> float:
        """Gradients of k, of the writes, of a, and of the states, which are there together."""
        if self.config.model.mixer == Mixer.attention:
            return 0.0
        states = head_dim(self.config.model) / self.config.model.memory.chunk
        return _FP32 * self.tokens * self.width * (3 + states)

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
            kept_by_view = bool(memory.output_gate)
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
        return kept + 4 * angles * _FP32  # cos and sin, for q and for k

    def _memory(self) -> float:
        """The memory mixers; all in fp32 from the convolution on, see nlscale.ops.chunk."""
        model = self.config.model
        memory, d, length = model.memory, head_dim(model), self.config.data.sequence_length
        inputs = 2 if memory.separate_inputs else 1
        modifies_itself = model.mixer != Mixer.gated_delta
        channels, scalars = self.tokens * self.width, self.tokens * self.heads

        tail = self.rows * (memory.convolution - 1) * self.width
        # inputs of the convolution and of the SiLU
        kept = self.element * inputs * (2 * channels + tail)
        kept += 2 * _FP32 * (channels + scalars)  # a and q before they are normalised
        if memory.read_norm:
            kept += _FP32 * (2 * channels + scalars)
        if memory.output_gate:
            kept += self.element * 2 * channels  # the read and the SiLU of its gate
        if modifies_itself:
            # [M_k; m_eta; m_alpha] and M_v, once a sequence
            kept += _FP32 * self.rows * self.heads * (2 * d + 2) * d
            if model.mixer != Mixer.hope:
                kept += _FP32 * (channels + self.rows * self.heads * d * d)  # M_m times the read
            elif self.element < _FP32:
                kept += _FP32 * 2 * self.heads * d * d  # M_k and M_v, to be weighted in fp32

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
        modifies_itself = model.mixer != Mixer.gated_delta
        # the states: Pi, S or both
        rows = d * (modifies_itself + (model.mixer in (Mixer.hope, Mixer.gated_delta)))
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
        """SwiGLU of that many hidden units: the up projection and the SiLU of its gate."""
        return 3.0 * self.tokens * self.element * hidden

    def _level_hidden(self) -> list[int]:
        return [h // self.config.parallel.tensor for h in level_hidden(self.config)]

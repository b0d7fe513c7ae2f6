"""Bytes that the backward pass needs, kept by the forward pass of one micro batch on one rank.

Written down from what `nlscale.model` and `nlscale.ops` do on a GPU; tests/plan compares it with
what autograd really saves. Tensors count with the whole of their storage, because a view keeps
all of it: a gate is a part of the projection, and keeps the projection. With `train.kernels` small
operations that follow each other keep what they begin with and nothing between them.

A few numbers a layer that do not grow with the batch or the sequence are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nlscale.config.in_context import in_context, local_at
from nlscale.config.vocabulary import CmsForm, ContextObjective, Recompute
from nlscale.model.mixers.facts import FP32, MicroBatch
from nlscale.model.pattern import block_kinds
from nlscale.model.sizes import mlp_hidden

_INT64 = 8


@dataclass(frozen=True)
class Activations(MicroBatch):
    """What one micro batch takes on one tensor-parallel rank."""

    vocabulary: int

    def blocks(self, depths: Iterable[int]) -> float:
        """Kept by these blocks."""
        recompute, wanted = self.config.train.recompute, set(depths)
        beside = self._norm() + self._cms(Recompute.cms in recompute)
        kept = sum(self._in_context(depth) for depth in wanted)
        for kind in block_kinds(self.config):
            own = kind.facts.kept(MicroBatch(kind.config), Recompute.mixer in recompute)
            kept += len(wanted.intersection(kind.depths)) * (beside + own)
        return kept

    def _in_context(self, depth: int) -> float:
        """Kept by what changes the MLPs of a block inside the context."""
        model, kept = self.config.model, 0.0
        channels = self.tokens * self.element * model.d_model
        recompute = Recompute.cms in self.config.train.recompute
        for _ in local_at(self.config, depth):
            # the targets; and what the convolution takes, and makes
            kept += channels if recompute else channels * (2 + 1)
            # the input of the MLP, whole where otherwise this rank's part of it is kept
            kept += 0.0 if self._mixes_levels else channels - self.residual
            # which `rate * y` keeps, where there is a weight in the rate
            kept += channels if self._mixes_levels else 0.0
        return kept

    def embedding(self) -> float:
        """Kept by the embedding: the token ids."""
        return self.tokens * _INT64

    def head(self) -> float:
        """Kept by the last norm, the head and the cross entropy: the logits, once."""
        rows = self.tokens * (_INT64 + FP32)  # target and log-sum-exp of each
        return self._norm() + self.residual + self._logits * self.element + rows

    def forward(self, head: bool) -> float:
        """The most that a forward pass holds of which nothing is kept, with a head or without.

        At most what a block would keep for its backward pass, and the residual stream; in the head
        the logits, once more in fp32 while the loss is taken.
        """
        block = max(self.blocks([depth]) for depth in self._of_each_kind()) + self.transient()
        logits = self._logits * (self.element + FP32) + self._norm() + self.residual
        return self.residual + self.gathered() + max(block, logits if head else 0.0)

    @property
    def _logits(self) -> float:
        return self.tokens * self.vocabulary / self.config.parallel.tensor

    def gathered(self) -> float:
        """megatron-core's buffer, for all micro batches, in which a split sequence is gathered."""
        model, parallel = self.config.model, self.config.parallel
        return self.tokens * model.d_model * self.element if parallel.sequence else 0

    def transient(self) -> float:
        """The largest of what exists for a moment only, beside all that is kept.

        The backward pass of a mixer, or a part of one block while it is computed again. The
        gradient of the logits takes their own place.
        """
        recompute, model = self.config.train.recompute, self.config.model
        parts = [
            kind.facts.transient(MicroBatch(kind.config), Recompute.mixer in recompute)
            for kind in block_kinds(self.config)
        ]
        if Recompute.cms in recompute:
            parts.append(max(self._hidden(h) for h in self._mlp_hidden()))
        for each in in_context(self.config, ContextObjective.local):
            hidden = mlp_hidden(self.config)[each.mlp] // self.config.parallel.tensor
            # gradients of targets and hidden units, cut into chunks and whole; the change and its
            # gradient, and what is added to each
            channels = 2 * self.tokens * self.element * (hidden + model.d_model)
            parts.append(channels + 4 * self.rows * FP32 * hidden * model.d_model)
        if self._mixes_levels:
            # what each level adds to the residual stream, once by itself and once stacked
            parts.append(2 * len(self._mlp_hidden()) * self.tokens * model.d_model * self.element)
        return max(parts)

    def _of_each_kind(self) -> list[int]:
        """One block of each mixer."""
        return [kind.depths[0] for kind in block_kinds(self.config)]

    def _norm(self) -> float:
        """RMSNorm keeps its input and the inverse root of each token."""
        return self.residual + self.own_tokens * FP32

    def _cms(self, recompute: bool) -> float:
        """The MLPs of a block, from the residual stream on, with their norms."""
        widths, model = self._mlp_hidden(), self.config.model
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
        return model.cms == CmsForm.independent and len(self._mlp_hidden()) > 1

    def _hidden(self, hidden: int) -> float:
        """SwiGLU of that many hidden units: the up projection, and the SiLU of its gate."""
        return (2.0 if self.compiled else 3.0) * self.tokens * self.element * hidden

    def _mlp_hidden(self) -> list[int]:
        return [h // self.config.parallel.tensor for h in mlp_hidden(self.config)]

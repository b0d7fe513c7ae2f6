"""Levels inside the context: MLPs that change while a sequence is read (docs/concepts/context.md).

`local`: W_down of chunk j is W_down + eta sum_{i<j} rho^(j-1-i) Vhat_i^T H_i / C, with H the hidden
units of the MLP and Vhat = convolution(x) W_t^T, x its input. Hidden units are split over the
tensor-parallel group, and the change with them; the targets Vhat are made in parts and gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.in_context import InContext
from nlscale.config.vocabulary import ModelConfig
from nlscale.model.init import normal, tag
from nlscale.model.layers import (
    column_linear,
    gather_channels,
    gather_input,
    product,
    recomputed,
    reduce_output,
)
from nlscale.model.mixers.state import State, last_inputs
from nlscale.model.sizes import CONTEXT_WINDOW
from nlscale.model.width import width_multiplier
from nlscale.ops.context import Change, changed, changed_on
from nlscale.ops.documents import Documents
from nlscale.ops.pointwise import short_convolution


class Changing(Protocol):
    """What of an MLP a change needs: this rank's part of it (`nlscale.model.cms.LevelMLP`)."""

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden units."""
        ...

    def product_down(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """Output of weight * hidden."""
        ...


@dataclass
class ContextState(State):
    """What one MLP carries from a piece of the sequences to the next."""

    tail: Tensor
    """The last inputs of the convolution, [batch, window - 1, d_model]."""
    change: Tensor
    """Of the down projection, without the learning rate, [batch, d_model, hidden]."""
    opened: Tensor
    """The sum of the chunk that is not over, like it."""
    position: Tensor
    """Tokens of that chunk, int64 [batch], on the CPU."""

    def add(self, h: Tensor, v: Tensor, chunk: int, decay: float, active: Tensor | None) -> Tensor:
        """Read one token of every row, in place.

        Args:
            h: hidden units, [batch, hidden].
            v: targets, [batch, d_model].
            chunk, decay: of the level.
            active: rows that read their token, bool [batch], on the CPU; None: all.

        Returns:
            What the change adds to the product, [batch, d_model].
        """
        wide_h, wide_v = h.to(self.change.dtype), v.to(self.change.dtype)
        y = (self.change @ wide_h[..., None])[..., 0].to(h.dtype)
        if active is not None:
            wide_v = wide_v * active.to(v.device)[:, None]
        self.opened.add_(wide_v[..., None] * wide_h[:, None])
        self.position += 1 if active is None else active
        over = self.position == chunk
        if bool(over.any()):
            rows = over.nonzero()[:, 0]
            self.position[rows] = 0
            rows = rows.to(h.device)
            self.change[rows] = decay * self.change[rows] + self.opened[rows] / chunk
            self.opened[rows] = 0
        return y


class BlockState(State):
    """What a block carries: the state of its mixer, and those of MLPs that change."""

    def __init__(
        self, mixer: Any, contexts: dict[str, ContextState], chunks: dict[str, int]
    ) -> None:
        """Args: of the mixer; of the MLPs by their places, and how many tokens their chunks are."""
        self.mixer, self.contexts, self.chunks = mixer, contexts, chunks

    def _each(self) -> dict[str, State]:
        return {"": self.mixer, **{f"context.{i}.": x for i, x in self.contexts.items()}}

    def select(self, rows: Tensor) -> BlockState:
        chosen = {i: x.select(rows) for i, x in self.contexts.items()}
        return BlockState(self.mixer.select(rows), chosen, self.chunks)

    def reset(self, rows: Tensor) -> None:
        for state in self._each().values():
            state.reset(rows)

    def tensors(self) -> dict[str, Tensor]:
        return {p + k: x for p, state in self._each().items() for k, x in state.tensors().items()}

    def restored(self, tensors: dict[str, Tensor], device: torch.device) -> BlockState:

        def of(prefix: str, state: State) -> Any:
            return state.restored({k: tensors[prefix + k] for k in state.tensors()}, device)

        made = {prefix: of(prefix, state) for prefix, state in self._each().items()}
        contexts = {i: made[f"context.{i}."] for i in self.contexts}
        return BlockState(made[""], contexts, self.chunks)

    def form(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {p + k: x for p, state in self._each().items() for k, x in state.form().items()}

    def fits(self, mixer: Any, lengths: Tensor) -> bool:
        at = all(
            torch.equal(x.position, lengths % self.chunks[i]) for i, x in self.contexts.items()
        )
        return at and bool(self.mixer.fits(mixer, lengths))


class LocalChange(nn.Module):
    """What the down projection of an MLP of the same block becomes while a sequence is read."""

    def __init__(
        self,
        model: ModelConfig,
        megatron: TransformerConfig,
        of: InContext,
        residual_std: float,
        recompute: bool,
    ) -> None:
        super().__init__()
        d, wider = model.d_model, width_multiplier(model)
        self.megatron, self.chunk, self.decay = megatron, of.chunk, of.keys.decay
        # The product of a token's hidden units with another's grows with their number.
        self.rate = of.keys.learning_rate / wider
        self.target = column_linear(megatron, d, [d], normal(residual_std), wider)
        self.convolution = nn.Parameter(torch.empty(CONTEXT_WINDOW, d, dtype=megatron.params_dtype))
        # a rank sees what its own channels of the targets make of it
        split = megatron.tensor_model_parallel_size > 1
        tag(self.convolution, normal(CONTEXT_WINDOW**-0.5), partial_gradient=split)
        self.recompute = recompute
        if recompute:
            self.target.gradient_accumulation_fusion = False

    def forward(
        self,
        mlp: Changing,
        x: Tensor,
        state: ContextState | None,
        documents: Documents | None,
        lengths: Tensor | None,
        carry: bool,
    ) -> tuple[Tensor, ContextState | None]:
        """MLP(x) with the change, and where the piece ends, if it is to be carried."""
        x = gather_input(self.megatron, x)
        partial, state = self.partial(mlp, None, x, state, documents, lengths, carry)
        return reduce_output(self.megatron, partial), state

    def partial(
        self,
        mlp: Changing,
        weight: Tensor | None,
        x: Tensor,
        state: ContextState | None,
        documents: Documents | None,
        lengths: Tensor | None,
        carry: bool,
    ) -> tuple[Tensor, ContextState | None]:
        """This rank's part of it, as `LevelMLP.partial`; a `weight` of None is 1."""
        window = len(self.convolution)
        tail = x.new_zeros(window - 1, *x.shape[1:])
        if state is not None:
            tail = state.tail.transpose(0, 1)
        position = None if documents is None else documents.position

        def targets(x: Tensor) -> Tensor:
            return product(self.target, short_convolution(x, self.convolution, tail, position))

        v = gather_channels(recomputed(targets, x) if self.recompute else targets(x))
        h = mlp.hidden(x)
        end = None
        if carry:
            before = None if state is None else Change(state.change, state.opened, state.position)
            y, after = changed_on(h, v, self.chunk, self.decay, before, lengths)
            end = ContextState(last_inputs(tail, x, lengths), *after)
        else:
            filled = None if documents is None else documents.in_chunks[self.chunk]
            y = changed(h, v, self.chunk, self.decay, filled)
        rate = self.rate if weight is None else self.rate * weight
        return mlp.product_down(h, weight) + rate * y, end

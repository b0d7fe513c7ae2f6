"""The Continuum Memory System: a block's feed-forward part as MLPs of different levels.

More of it in docs/concepts/cms.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.in_context import InContext
from nlscale.config.vocabulary import CmsForm, ModelConfig
from nlscale.model.context import ContextState, LocalChange
from nlscale.model.init import constant, normal, tag
from nlscale.model.layers import (
    RMSNorm,
    column_linear,
    gather_input,
    product,
    recomputed,
    reduce_output,
    row_linear,
)
from nlscale.model.width import width_multiplier
from nlscale.ops.documents import Documents
from nlscale.ops.pointwise import compiled_on_gpu, swiglu


class LevelMLP(nn.Module):
    """SwiGLU: W_down ( SiLU(W_gate x) * W_up x ), hidden units split over the tensor group."""

    def __init__(
        self,
        model: ModelConfig,
        megatron: TransformerConfig,
        hidden: int,
        residual_std: float,
        recompute: bool,
        kernels: bool,
    ) -> None:
        super().__init__()
        d, wider = model.d_model, width_multiplier(model)
        self.up = column_linear(megatron, d, [hidden, hidden], normal(model.init_std), wider)
        self.down = row_linear(megatron, hidden, d, normal(residual_std), wider)
        self.recompute = recompute
        if recompute:
            # The second time, autograd hands on a copy of the weight that knows of no buffer.
            self.up.gradient_accumulation_fusion = False
        self.swiglu = compiled_on_gpu(swiglu, kernels)
        self.changes: tuple[Tensor, Tensor] | None = None
        """What each row's sequence adds to the weights, `up` and `down` as they are stored, behind
        a batch dimension; in a process alone (`nlscale.model.changing`)."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._hidden(lambda x: self.up(x)[0], x)
        return self._changed(self.down(hidden)[0], hidden, 1)

    def partial(self, weight: Tensor, x: Tensor) -> Tensor:
        """This rank's part of weight * MLP(x), for x that `gather_input` returned.

        To be summed over the levels and then, once, over the tensor group.
        """
        return self.product_down(self.hidden(x), weight)

    def hidden(self, x: Tensor) -> Tensor:
        """This rank's hidden units, for x that `gather_input` returned."""
        return self._hidden(lambda x: product(self.up, x), x)

    def product_down(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """This rank's part of the output, of weight * hidden; a weight of None is 1."""
        hidden = hidden if weight is None else weight * hidden
        return self._changed(product(self.down, hidden), hidden, 1)

    def _changed(self, y: Tensor, x: Tensor, place: int) -> Tensor:
        """y, the product of a weight with x [sequence, batch, inputs], and of its change."""
        if self.changes is None:
            return y
        return y + (x.transpose(0, 1) @ self.changes[place].mT).transpose(0, 1)

    def _hidden(self, up_projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def hidden(x: Tensor) -> Tensor:
            return self.swiglu(self._changed(up_projection(x), x, 0))

        return recomputed(hidden, x) if self.recompute else hidden(x)


class CMS(nn.Module):
    """k MLPs, of a level each, fastest first; k = 1 is the ordinary feed-forward layer.

    sequential (Eq. 70): x <- x + MLP_l(norm_l(x)) for each level in turn.
    independent: x + sum_l w_l MLP_l(norm(x)), w = softmax of learned logits, one reduction in all.
    Some of them may change while a sequence is read (`nlscale.model.context`).
    """

    def __init__(
        self,
        model: ModelConfig,
        megatron: TransformerConfig,
        hidden: list[int],
        residual_std: float,
        recompute: bool,
        kernels: bool,
        contexts: Sequence[InContext] = (),
    ) -> None:
        super().__init__()
        self.megatron, self.independent = megatron, model.cms == CmsForm.independent
        self.mlps = nn.ModuleList(
            LevelMLP(model, megatron, h, residual_std, recompute, kernels) for h in hidden
        )
        norms = 1 if self.independent else len(hidden)
        self.norms = nn.ModuleList(
            RMSNorm(megatron, model.d_model, model.norm_eps, kernels) for _ in range(norms)
        )
        if self.independent and len(hidden) > 1:
            self.mixture = nn.Parameter(torch.empty(len(hidden), dtype=megatron.params_dtype))
            # a rank sees what its own hidden units make of each weight
            tag(
                self.mixture,
                constant(0.0),
                partial_gradient=megatron.tensor_model_parallel_size > 1,
            )
        else:
            self.register_parameter("mixture", None)
        self.contexts = nn.ModuleDict(
            {str(c.mlp): LocalChange(model, megatron, c, residual_std, recompute) for c in contexts}
        )

    @property
    def chunks(self) -> dict[str, int]:
        """Tokens between two changes of the MLPs that change, by their places."""
        return {place: change.chunk for place, change in self.contexts.items()}  # type: ignore[misc]

    def forward(
        self,
        x: Tensor,
        update: Tensor,
        states: dict[str, ContextState] | None = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
        carry: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, ContextState]]:
        """Residual stream and what is to be added to it, before and after.

        Args:
            x, update: [sequence, batch, d_model].
            states: where an earlier piece ended, of the MLPs that change, by their places.
            documents, lengths: as a mixer takes them.
            carry: whether to return where this piece ends, of these MLPs; else of none.
        """
        ends: dict[str, ContextState] = {}

        def change(place: int, name: str) -> Callable[..., Tensor] | None:
            """Of what changes this MLP the method of that name; None: nothing does."""
            key = str(place)
            if key not in self.contexts:
                return None

            def read(*given: Any) -> Tensor:
                state = None if states is None else states[key]
                method = getattr(self.contexts[key], name)
                y, end = method(*given, state, documents, lengths, carry)
                if end is not None:
                    ends[key] = end
                return y  # type: ignore[no-any-return]

            return read

        if self.mixture is None:
            for place, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
                x, normed = norm.after(x, update)  # type: ignore[operator]
                changing = change(place, "forward")
                update = mlp(normed) if changing is None else changing(mlp, normed)
            return x, update, ends
        x, normed = self.norms[0].after(x, update)  # type: ignore[operator]
        normed = gather_input(self.megatron, normed)
        weights = torch.softmax(self.mixture, 0)
        partials = []
        for place, (weight, mlp) in enumerate(zip(weights, self.mlps, strict=True)):
            changing = change(place, "partial")
            plain: Any = mlp.partial
            partials.append(
                plain(weight, normed) if changing is None else changing(mlp, weight, normed)
            )
        return x, reduce_output(self.megatron, torch.stack(partials).sum(0)), ends

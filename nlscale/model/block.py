"""One block of Hope: a mixer and a CMS, pre-normalised and residual (Eq. 94-97)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.in_context import InContext
from nlscale.config.vocabulary import ModelConfig, Recompute, TrainConfig
from nlscale.errors import UserError
from nlscale.model.cms import CMS
from nlscale.model.context import BlockState
from nlscale.model.init import full_shape
from nlscale.model.layers import RMSNorm
from nlscale.model.mixers.module import check_takes_lengths
from nlscale.model.mixers.table import mixer
from nlscale.model.pattern import model_of
from nlscale.ops.documents import Documents


class Block(nn.Module):
    """x <- x + mixer(norm(x)); x <- CMS(x). x is [sequence, batch, d_model]."""

    def __init__(
        self,
        model: ModelConfig,
        megatron: TransformerConfig,
        hidden: list[int],
        train: TrainConfig,
        depth: int = 0,
        contexts: Sequence[InContext] = (),
    ) -> None:
        super().__init__()
        model = model_of(model, depth)
        # two additions to the residual stream a block, whatever the number of levels
        residual_std = model.init_std / (2 * model.layers) ** 0.5
        recompute, kernels = train.recompute, train.kernels
        self.norm = RMSNorm(megatron, model.d_model, model.norm_eps, kernels)
        self.mixer = mixer(model.mixer).make(
            model, megatron, residual_std, Recompute.mixer in recompute, kernels
        )
        _check_counts(self.norm, self.mixer, model, megatron.tensor_model_parallel_size)
        self.cms = CMS(
            model, megatron, hidden, residual_std, Recompute.cms in recompute, kernels, contexts
        )

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        state: Any = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
        carry: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """Residual stream x, what is still to be added to it, and the mixer's state.

        With `carry` the state is also that of MLPs that change, where there are some. An update is
        added where it is normalised, so that both are one pass over memory.
        """
        contexts = None
        if isinstance(state, BlockState):
            state, contexts = state.mixer, state.contexts
        x, normed = self.norm.after(x, update)
        if lengths is None:  # not all mixers know of it
            mixed, state = self.mixer(normed, state, documents)
        else:
            check_takes_lengths(self.mixer)
            mixed, state = self.mixer(normed, state, documents, lengths)
        x, update, ends = self.cms(x, mixed, contexts, documents, lengths, carry)
        return x, update, BlockState(state, ends, self.cms.chunks) if ends else state


def _check_counts(norm: RMSNorm, mixer_: nn.Module, model: ModelConfig, tensor_size: int) -> None:
    """Hold a mixer against its facts, from which widths, plans and laws follow.

    Raises:
        UserError: a parameter that is not tagged, or more or fewer than the facts say.
    """
    count = 0
    for name, parameter in (*norm.named_parameters(), *mixer_.named_parameters()):
        if not hasattr(parameter, "tensor_model_parallel"):
            raise UserError(
                f"model.mixer={model.mixer}: its parameter {name} is not tagged; "
                f"nlscale.model.init.tag says how it is drawn and split"
            )
        count += math.prod(full_shape(parameter, tensor_size))
    said = mixer(model.mixer).parameters(model)
    if count != said:
        raise UserError(
            f"model.mixer={model.mixer}: its facts say {said:,} parameters a layer, with the norm "
            f"before it, and its module has {count:,}"
        )

"""One block of Hope: a mixer and a CMS, pre-normalised and residual (Eq. 94-97)."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.vocabulary import ModelConfig, Recompute, TrainConfig
from nlscale.errors import UserError
from nlscale.model.cms import CMS
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
        self.cms = CMS(model, megatron, hidden, residual_std, Recompute.cms in recompute, kernels)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        state: Any = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Residual stream x, what is still to be added to it, and the mixer's state.

        An update is added where it is normalised, so that both are one pass over memory.
        """
        x, normed = self.norm.after(x, update)
        if lengths is None:  # not all mixers know of it
            mixed, state = self.mixer(normed, state, documents)
        else:
            check_takes_lengths(self.mixer)
            mixed, state = self.mixer(normed, state, documents, lengths)
        return *self.cms(x, mixed), state


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

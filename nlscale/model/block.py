"""One block of Hope: a mixer and a CMS, pre-normalised and residual (Eq. 94-97)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config import Mixer, ModelConfig, Recompute, TrainConfig
from nlscale.model.cms import CMS
from nlscale.model.layers import RMSNorm
from nlscale.model.mixers.attention import Attention
from nlscale.model.mixers.memory import MemoryMixer
from nlscale.ops.documents import Documents


class Block(nn.Module):
    """x <- x + mixer(norm(x)); x <- CMS(x). x is [sequence, batch, d_model]."""

    def __init__(
        self,
        model: ModelConfig,
        mc: TransformerConfig,
        hidden: list[int],
        train: TrainConfig,
    ) -> None:
        super().__init__()
        # two additions to the residual stream a block, whatever the number of levels
        residual_std = model.init_std / (2 * model.layers) ** 0.5
        make = Attention if model.mixer == Mixer.attention else MemoryMixer
        recompute, kernels = train.recompute, train.kernels
        self.norm = RMSNorm(mc, model.d_model, model.norm_eps, kernels)
        self.mixer = make(model, mc, residual_std, Recompute.mixer in recompute, kernels)
        self.cms = CMS(model, mc, hidden, residual_std, Recompute.cms in recompute, kernels)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        state: Any = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Residual stream x, what is still to be added to it, and the mixer's state.

        An update is added where it is normalised, so that both are one pass over memory.
        """
        x, normed = self.norm.after(x, update)
        mixed, state = self.mixer(normed, state, documents)
        return *self.cms(x, mixed), state

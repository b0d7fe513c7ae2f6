"""One token of every row through attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nlscale.model.mixers.module import OneToken


class AttentionOneToken(OneToken):
    """What `Attention` computes, with its projections as plain products."""

    def __init__(self, mixer: Any) -> None:
        """Of an `Attention` that holds all heads."""
        super().__init__(mixer)
        self.project, self.output = mixer.project.weight, mixer.output.weight
        self.mix = mixer._mix

    def __call__(self, x: Tensor, state: Any, active: Tensor | None) -> tuple[Tensor, Any]:
        projected = F.linear(x, self.project)[None]
        lengths = None if active is None else active.long()
        read, state = self.mix(projected, state, None, lengths)
        return F.linear(read[0], self.output), state

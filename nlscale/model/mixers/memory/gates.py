"""Gates of a memory that are vectors over channels: the static part of their logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nlscale.config.vocabulary import ModelConfig, head_dim
from nlscale.model.init import normal, spread, tag
from nlscale.model.layers import gather_channels
from nlscale.ops.pointwise import wide

VECTORS = 3
"""Of what is erased, b, of what is written, w, and of the decay, alpha."""


class ChannelGates(nn.Module):
    """Logits U (D x) + bias of all three; the rank of U D is the size of a head.

    D x, which all heads read, is a section of the mixer's projection, and a rank of the
    tensor-parallel group makes a part of it.
    """

    def __init__(self, model: ModelConfig, heads: int, static: bool, dtype: torch.dtype) -> None:
        """Of so many heads on this rank; without `static` the logits are the biases alone."""
        super().__init__()
        n, memory = head_dim(model), model.memory
        self.bias = nn.Parameter(torch.empty(heads, VECTORS, n, dtype=dtype))
        # an eta_bias of b and of w, and memories of different reach by head
        of_strength, of_decay = float(memory.eta_bias or 0.0), spread(memory.alpha_bias, 1.0)

        def begin(full: Tensor, generator: torch.Generator) -> None:
            full.fill_(of_strength)
            of_decay(full[:, -1], generator)

        tag(self.bias, begin, 0, decays=False)
        if not static:
            self.register_parameter("up", None)
            return
        self.up = nn.Parameter(torch.empty(VECTORS * heads * n, n, dtype=dtype))
        tag(self.up, normal(n**-0.5), 0, sections=[model.heads * n] * VECTORS, matrix=True)

    def logits(self, down: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of b and w side by side, [batch, heads, sequence, 2 n], and of alpha, [..., n],
        in at least fp32; down is this rank's part of D x, [sequence, batch, n / ranks]."""
        sequence, batch, _ = down.shape
        heads, n = len(self.bias), self.bias.shape[-1]
        logits = self.bias.to(wide(self.bias)).flatten(1)[:, None]
        if self.up is None:
            logits = logits.expand(batch, heads, sequence, VECTORS * n)
        else:
            made = gather_channels(down) @ self.up.mT
            by_head = made.unflatten(-1, (VECTORS, heads, n)).permute(1, 3, 0, 2, 4).flatten(3)
            logits = by_head.to(logits.dtype) + logits
        eta, alpha = logits.split([2 * n, n], -1)
        return eta, alpha

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
    """Logits U_g (D_g x) + bias of each of the three; the rank of U_g D_g is the size of a head.

    D_g x, which all heads read, are sections of the mixer's projection; a rank of the
    tensor-parallel group makes a part of them.
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
        in at least fp32; down is this rank's part of D x, [sequence, batch, 3 n / ranks]."""
        sequence, batch, part = down.shape
        heads, n = len(self.bias), self.bias.shape[-1]
        bias = self.bias.to(wide(self.bias)).flatten(1)[:, None]
        if self.up is None:
            logits = bias.expand(batch, heads, sequence, VECTORS * n)
        else:
            gathered = gather_channels(down).unflatten(-1, (-1, VECTORS, part // VECTORS))
            low = gathered.permute(3, 0, 1, 2, 4).reshape(VECTORS, sequence * batch, n)
            made = low @ self.up.view(VECTORS, heads * n, n).mT
            made = made.view(VECTORS, sequence, batch, heads, n).permute(2, 3, 1, 0, 4)
            logits = made.flatten(3).to(bias.dtype) + bias
        eta, alpha = logits.split([2 * n, n], -1)
        return eta, alpha

"""M3, multi-scale momentum: a fast and a slow memory of gradients (Algorithm 1).

    M1 <- b1 M1 + (1 - b1) G        V <- b2 V + (1 - b2) G o G
    M2 <- b3 M2 + (1 - b3) mean G, O2 = NS(M2)         every f updates
    U = ( NS( (1 - b1) G + b1 M1 ) + a O2 ) / ( sqrt(V / (1 - b2^t)) + eps ),  then RMS(U) = 0.2

The paper sums in place of averaging, which grows without bound. Dividing an orthogonal update by
the root of tiny squares is mended by the normalisation. The updates of the slow memory count those
of the level, and are staggered over depth as levels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.optim.matrices import Exchange, MatrixRule, Ranges, Taken

_RMS = 0.2
"""Of an update, which makes rates of AdamW fit."""
_LEAST = 1e-30
"""Mean square that is divided by: an update that is 0 stays 0."""


class M3(MatrixRule):
    """M3 of matrices, AdamW of the rest."""

    names = ("momentum", "second_moment", "slow_momentum", "slow_direction")
    own_scale = True

    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        own, mixed = self.config.m3, []
        for gradient, state, depth in zip(gradients, kept, exchange.depths, strict=True):
            momentum = state["momentum"].lerp_(gradient, taken.weight * (1 - own.momentum))
            mixed.append(gradient.lerp(momentum, own.momentum))
            square = taken.weight * (1 - own.second_moment)
            state["second_moment"].lerp_(gradient.square(), square)
            # The mean of f gradients is added up in place: the first of them decays what was there.
            decay = own.slow_momentum if self._position(depth) == 0 else 1.0
            slow = state["slow_momentum"].mul_(1 - taken.weight * (1 - decay))
            slow.add_(gradient * (taken.weight * ((1 - own.slow_momentum) / own.every)))
        (fast,) = exchange.on_whole([mixed], lambda x: (self.orthogonal(x),))
        self._turn(exchange, kept, taken)
        raised = []
        for direction, state in zip(fast, kept, strict=True):
            unbiased = 1 - own.second_moment ** (state["step"] + 1)
            root = (state["second_moment"] / unbiased).sqrt_().add_(self.config.eps)
            raised.append((direction + own.slow_weight * state["slow_direction"]) / root)
        return exchange.of_matrix(raised, lambda mean: _RMS * mean.clamp(min=_LEAST).rsqrt())

    def _turn(self, exchange: Exchange, kept: list[dict[str, Tensor]], taken: Taken) -> None:
        """Orthogonalise the slow memories of which this was the last gradient of f."""
        last = self.config.m3.every - 1
        depths = {depth for depth in range(self.layers) if self._position(depth) == last}
        if not depths:
            return
        slow = [state["slow_momentum"] for state in kept]
        (found,) = exchange.on_whole([slow], lambda x: (self.orthogonal(x),), depths=depths)
        for state, new, depth in zip(kept, found, exchange.depths, strict=True):
            if depth in depths:
                before = state["slow_direction"]
                before.copy_(torch.where(taken.skipped, before, new))

    def _position(self, depth: int) -> int:
        """How many of f gradients the slow memory of a block has, before this one."""
        every = self.config.m3.every
        return (self.updates + depth * every // self.layers) % every

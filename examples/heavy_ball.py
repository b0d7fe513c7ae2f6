"""A rule over whole matrices (`examples.additions` adds it as `optimizer.rule=heavy-ball`).

The momentum itself is orthogonalised, where Muon looks ahead by a gradient:

    M <- b M + (1 - b) G        U = NS( M )
"""

from __future__ import annotations

from torch import Tensor

from nlscale.optim.matrices import Exchange, MatrixRule, Ranges, Taken


class HeavyBall(MatrixRule):
    """Of matrices; AdamW of the rest. b is `optimizer.beta1`."""

    names = ("momentum",)

    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        """The momentum of this rank's ranges moves on; that of whole matrices is orthogonalised."""
        momenta = []
        for gradient, state in zip(gradients, kept, strict=True):
            momentum = state["momentum"].lerp_(gradient, taken.weight * (1 - self.config.beta1))
            momenta.append(momentum)
        (found,) = exchange.on_whole([momenta], lambda x: (self.orthogonal(x),))
        return found

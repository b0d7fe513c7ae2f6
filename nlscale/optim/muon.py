"""Muon: momentum, orthogonalised (Jordan et al. 2024).

M <- b M + (1 - b) G        U = NS( (1 - b) G + b M )
"""

from __future__ import annotations

from torch import Tensor

from nlscale.optim.matrices import Exchange, MatrixRule, Ranges, Taken


class Muon(MatrixRule):
    """Muon of matrices, AdamW of the rest."""

    names = ("momentum",)

    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        b, mixed = self.config.muon.momentum, []
        for gradient, state in zip(gradients, kept, strict=True):
            momentum = state["momentum"].lerp_(gradient, taken.weight * (1 - b))
            mixed.append(gradient.lerp(momentum, b))
        (found,) = exchange.on_whole([mixed], lambda x: (self.orthogonal(x),))
        return found

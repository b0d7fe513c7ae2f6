"""Delta momentum: a memory of gradients that is written by the delta rule (Eq. 49).

    M <- b M + (1 - b) G - eta M H^T H,   H = G / |G|        U = NS( (1 - b) G + b M )

H^T H has no singular value above 1, so that with eta at most 1 forgetting never adds. Along rows
that the gradient does not have the memory is that of Muon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.optim.matrices import Exchange, MatrixRule, Ranges, Taken

_EPS = 1e-30
"""Least norm that is divided by: any gradient but 0 has a direction."""


class Delta(MatrixRule):
    """Delta momentum of matrices, AdamW of the rest."""

    names = ("momentum",)

    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        b, eta = self.config.delta.momentum, self.config.delta.eta

        def written(gradient: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
            h = gradient / torch.linalg.matrix_norm(gradient, keepdim=True).clamp(min=_EPS)
            forgotten = eta * (momentum @ h.mT) @ h
            moved = b * momentum + (1 - b) * gradient - forgotten
            return self.orthogonal((1 - b) * gradient + b * moved), forgotten

        momenta = [state["momentum"] for state in kept]
        found, forgotten = exchange.on_whole([gradients, momenta], written, results=2)
        # What is forgotten may come in bf16; what is kept is never rounded to it.
        for momentum, gradient, less in zip(momenta, gradients, forgotten, strict=True):
            momentum.lerp_(gradient, taken.weight * (1 - b)).sub_(less * taken.weight)
        return found

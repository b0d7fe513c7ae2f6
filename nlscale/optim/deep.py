"""Deep momentum: a memory of gradients that is read through a small network (Eq. 50, for research).

    M <- b M + (1 - b) G        m(u) = u + B s(A u), s = SiLU
    U = NS( m(rows of (1 - b) G + b M) )

The network learns which gradient follows on what momentum. At each update, with the rows of M,
before it, as keys and those of G as values, each of a mean square of 1,

    L = 1/2 mean over rows |m(k) - v|^2        A <- A - step        B <- decay B - step

and a step is the derivative, normalised to `rate` of the norm that A begins with. m reads rows of a
mean square of 1, and what it returns is given the size of the row again. The choices that the paper
leaves open are ours: both networks' rank, what is normalised, and what A begins with, the rows of a
cosine transform, so that nothing is drawn.

Both are kept in one tensor of the matrix's shape, A - A0 above B^T, and so are sharded and saved as
momentum is; that bounds their rank to out / 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.optim.matrices import Exchange, MatrixRule, Ranges, Taken

_LEAST = 1e-30
"""Norm or mean square that is divided by: what is 0 stays 0."""


class Deep(MatrixRule):
    """Deep momentum of matrices, AdamW of the rest."""

    names = ("momentum", "network")

    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        b = self.config.deep.momentum

        def read(gradient: Tensor, before: Tensor, network: Tensor) -> tuple[Tensor, Tensor]:
            moved = self._learned(network, before, gradient)
            mixed = (1 - b) * gradient + b * torch.lerp(before, gradient, 1 - b)
            rows = _sizes(mixed)
            through = rows * _through(moved, mixed / rows, self._rank(mixed))
            return self.orthogonal(through), moved - network

        before = [state["momentum"] for state in kept]
        networks = [state["network"] for state in kept]
        found, steps = exchange.on_whole([gradients, before, networks], read, results=2)
        for momentum, gradient in zip(before, gradients, strict=True):
            momentum.lerp_(gradient, taken.weight * (1 - b))
        # A step may come in bf16; what is kept is never rounded to it.
        for network, step in zip(networks, steps, strict=True):
            network.add_(step * taken.weight)
        return found

    def _rank(self, matrices: Tensor) -> int:
        out, into = matrices.shape[1:]
        return min(into // self.config.deep.inputs_per_rank, out // 2)

    def _learned(self, network: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The networks after a step on what followed on what; all [number, out, in]."""
        own, rank = self.config.deep, self._rank(keys)
        if rank == 0:
            return network
        k, v = keys / _sizes(keys), values / _sizes(values)
        a, b = _parts(network, rank)
        inside = k @ a.mT
        error = (k + F.silu(inside) @ b - v) / keys.shape[1]
        sigmoid = torch.sigmoid(inside)
        slope = sigmoid * (1 + inside * (1 - sigmoid))
        step = own.rate * math.sqrt(rank)
        moved = network.clone()
        moved[:, :rank] -= step * _direction(((error @ b.mT) * slope).mT @ k)
        moved[:, rank : 2 * rank].mul_(own.decay)
        moved[:, rank : 2 * rank] -= step * _direction(F.silu(inside).mT @ error)
        return moved


def _through(network: Tensor, rows: Tensor, rank: int) -> Tensor:
    """m of every row."""
    if rank == 0:
        return rows
    a, b = _parts(network, rank)
    return rows + F.silu(rows @ a.mT) @ b


def _parts(network: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B^T, [number, rank, in]."""
    into = network.shape[2]
    frequency = torch.arange(1, rank + 1, device=network.device)[:, None]
    place = torch.arange(into, device=network.device) + 0.5
    first = torch.cos(math.pi / into * frequency * place) * math.sqrt(2 / into)
    return network[:, :rank] + first.to(network.dtype), network[:, rank : 2 * rank]


def _sizes(rows: Tensor) -> Tensor:
    """Root of the mean square of each row, [number, out, 1]."""
    return rows.square().mean(-1, keepdim=True).clamp(min=_LEAST).sqrt()


def _direction(x: Tensor) -> Tensor:
    return x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_LEAST)

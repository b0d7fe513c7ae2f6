"""A chunk of a memory that is scanned chunk by chunk, by what its gates are.

Decay and write strength are a number a head and token (`HeadGates`), or vectors over channels
(`ChannelGates`). Both say the same of the tokens i, j of a chunk and of a memory Z at its start:

    D = (I + W)^{-1} ( X - Z at what each token erases )          what is written
    Z' = Z at the end + sum_j D_j n_j^T                           n_j: k_j, faded by then
    y_i = Z at the query, faded by then + sum_{j <= i} A_ij D_j

(docs/concepts/memory.md). Decays come only as exp of differences <= 0, and never as divisors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.ops.memory.rules import MemoryRules

_BLOCK = 8
"""Tokens whose pairs are made channel by channel; those further apart are a product."""


class HeadGates:
    """One number each a head and token; rows are tokens of a chunk, [batch, heads, C, ...]."""

    def __init__(self, k: Tensor, q: Tensor, eta: Tensor, alpha: Tensor, rules: MemoryRules):
        """k, q [batch, heads, C, d] of unit norm; logits eta and alpha [batch, heads, C]."""
        self.k, self.q = k, q
        self.strength = r = (rules.strength * torch.sigmoid(eta))[..., None]
        log_decay = F.logsigmoid(alpha)
        g = log_decay.cumsum(-1)
        before = g if rules.decayed_write else g - log_decay
        self.decayed, self.decayed_before = torch.exp(g)[..., None], torch.exp(before)[..., None]
        left = _fade(g, g, 0)
        self.coupling = r * _fade(before, g, -1) * (k @ k.mT)
        self.scores = left * (q @ k.mT)
        self.end, self.whole = left[..., -1, :, None] * k, self.decayed[..., -1:, :]

    def weighed(self, value: Tensor) -> Tensor:
        """What is to be written of a value; its strength comes with `written`."""
        return value

    def written(self, target: Tensor, memory: Tensor, anchored: bool = False) -> Tensor:
        """D, [batch, heads, C, d].

        Args:
            target: what the memory is to hold at each key, of `weighed`, likewise.
            memory: at the start of the chunk, [batch, heads, d, d].
            anchored: whether it decays toward the identity.
        """
        right = target - self.decayed_before * (self.k @ memory.mT)
        if anchored:
            right = right - (1 - self.decayed_before) * self.k
        return _solve(self.coupling, self.strength * right)

    def read(self, memory: Tensor, written: Tensor) -> Tensor:
        """What the queries read, [batch, heads, C, d]."""
        return self.decayed * (self.q @ memory.mT) + self.scores @ written

    def added(self, written: Tensor) -> Tensor:
        """What is left of the writes after the chunk, [batch, heads, d, d]."""
        return written.mT @ self.end


class ChannelGates:
    """Vectors: of the decay alpha and of what is erased, b, over the channels of a key; of what is
    written, w, over those of a value. Of writes that erase what has decayed,

        S_t = S_{t-1} Diag(alpha) (I - (b o k) k^T) + (w o v) k^T

    so that with g the cumulative log of alpha, a vector,

        W_ij = sum_c b_ic k_ic exp(g_ic - g_jc) k_jc   for j < i;     A of q likewise, for j <= i
        D = (I + W)^{-1} ( w o v - (exp(g) o b o k) S^T )
    """

    def __init__(self, k: Tensor, q: Tensor, eta: Tensor, alpha: Tensor, rules: MemoryRules):
        """k, q [batch, heads, C, d] of unit norm; logits alpha likewise, and eta of b and w side by
        side, [batch, heads, C, 2 d]."""
        erase, self.strength = (rules.strength * torch.sigmoid(eta)).chunk(2, dim=-1)
        self.k, g = k, F.logsigmoid(alpha).cumsum(-2)
        decayed, self.erased = torch.exp(g), erase * k
        self.faded, self.faded_query = decayed * self.erased, decayed * q
        self.coupling, self.scores = _pairs((self.erased, q), k, g).unbind(2)
        self.end, self.whole = torch.exp(g[..., -1:, :] - g) * k, decayed[..., -1:, :]

    def weighed(self, value: Tensor) -> Tensor:
        """What is to be written of a value."""
        return self.strength * value

    def written(self, target: Tensor, memory: Tensor, anchored: bool = False) -> Tensor:
        """As that of `HeadGates`."""
        right = target - self.faded @ memory.mT
        if anchored:
            right = right - (self.erased - self.faded)
        return _solve(self.coupling, right)

    def read(self, memory: Tensor, written: Tensor) -> Tensor:
        """What the queries read, [batch, heads, C, d]."""
        return self.faded_query @ memory.mT + self.scores @ written

    def added(self, written: Tensor) -> Tensor:
        """What is left of the writes after the chunk, [batch, heads, d, d]."""
        return written.mT @ self.end


def _solve(coupling: Tensor, right: Tensor) -> Tensor:
    """(I + W)^{-1} times the right side; what is on and above the diagonal of W is not read."""
    return torch.linalg.solve_triangular(coupling, right, upper=False, unitriangular=True)


def _fade(after: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """exp(after_i - since_j) up to that diagonal, else 0; what lies above is masked before exp,
    where it may overflow."""
    difference = after[..., :, None] - since[..., None, :]
    below = torch.ones(difference.shape[-2:], dtype=torch.bool, device=after.device).tril(diagonal)
    return torch.exp(difference.masked_fill(~below, float("-inf")))


def _pairs(lefts: Sequence[Tensor], right: Tensor, g: Tensor) -> Tensor:
    """sum_c left_ic exp(g_ic - g_jc) right_jc of j <= i, else 0; of each of the lefts.

    exp(g_ic - g_jc) is a product of two factors where something lies between i and j: what is left
    of j when the block of i begins, and of that until i. Neither is above 1. Within a block there
    is no such place for all pairs, and they are made channel by channel. Where a block begins
    has no derivative: it cancels.

    Args:
        lefts: [batch, heads, C, d] each.
        right: likewise.
        g: cumulative log of the decay, likewise.

    Returns:
        [batch, heads, lefts, C, C].
    """
    size, rows = right.shape[-2], []
    left = torch.stack([*lefts], 2)
    for first in range(0, size, _BLOCK):
        block, last = slice(first, first + _BLOCK), min(first + _BLOCK, size)
        g_block, of_block = g[..., block, :], left[..., block, :]
        fade = _fade_by_channel(g_block) * right[..., None, block, :]  # [..., i, j, d]
        parts = [(of_block.movedim(2, -2) @ fade.mT).movedim(-2, 2)]
        if first:
            begin = g[..., first - 1 : first, :].detach()
            before = right[..., :first, :] * torch.exp(begin - g[..., :first, :])
            since = torch.exp(g_block - begin)
            parts.insert(0, (of_block * since[:, :, None]) @ before[:, :, None].mT)
        parts.append(parts[0].new_zeros(*parts[0].shape[:-1], size - last))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)


def _fade_by_channel(g: Tensor) -> Tensor:
    """exp(g_ic - g_jc) for j <= i, else 0, [batch, heads, i, j, d]."""
    difference = g[..., :, None, :] - g[..., None, :, :]
    below = torch.ones(difference.shape[-3:-1], dtype=torch.bool, device=g.device).tril()
    return torch.exp(difference.masked_fill(~below[..., None], float("-inf")))

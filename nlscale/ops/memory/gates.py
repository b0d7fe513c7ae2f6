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


class HeadGates:
    """One number each a head and token; rows are tokens of a chunk, [batch, heads, C, ...]."""

    def __init__(
        self, k: Tensor, q: Tensor, eta: Tensor, alpha: Tensor, rules: MemoryRules
    ) -> None:
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

    def __init__(
        self, k: Tensor, q: Tensor, eta: Tensor, alpha: Tensor, rules: MemoryRules
    ) -> None:
        """k, q [batch, heads, C, d] of unit norm; logits alpha likewise, and eta of b and w side by
        side, [batch, heads, C, 2 d]."""
        erase, self.strength = (rules.strength * torch.sigmoid(eta)).chunk(2, dim=-1)
        self.k, g = k, F.logsigmoid(alpha).cumsum(-2)
        decayed, self.erased = torch.exp(g), erase * k
        self.faded, self.faded_query = decayed * self.erased, decayed * q
        self.coupling, self.scores = _pairs((self.erased, q), k, g)
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


def _pairs(lefts: Sequence[Tensor], right: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """sum_c left_ic exp(g_ic - g_jc) right_jc of j <= i, else 0; of each of the lefts.

    Of two runs of tokens side by side, the decay from a token j of the first to a token i of the
    second is what is left of j at the end of the first, times what is left of that at i: neither is
    above 1, and all pairs of the two are one product. They are one run of twice as many tokens, and
    the first runs are tokens. Where two meet has no derivative: it cancels.

    Args:
        lefts: [batch, heads, C, d] each.
        right: likewise.
        g: cumulative log of the decay, likewise.

    Returns:
        [batch, heads, C, C] each.
    """
    size, whole, left = right.shape[-2], 1, torch.stack([*lefts], -2)
    while whole < size:
        whole *= 2
    if whole > size:  # filled up with tokens that write and read nothing, and decay by nothing
        left = F.pad(left, (0, 0, 0, 0, 0, whole - size))
        right = F.pad(right, (0, 0, 0, whole - size))
        g = torch.cat([g, g[..., -1:, :].expand(*g.shape[:-2], whole - size, -1)], -2)
    found = (left @ right[..., None])[..., None, :, :]  # [batch, heads, runs, i, lefts, j]
    run = 1
    while run < whole:
        before, after = g.unflatten(-2, (-1, 2 * run)).split(run, -2)
        meet = before[..., -1:, :].detach()
        since = right.unflatten(-2, (-1, 2 * run))[..., :run, :] * torch.exp(meet - before)
        until = left.unflatten(-3, (-1, 2 * run))[..., run:, :, :]
        until = until * torch.exp(after - meet)[..., None, :]
        across = (until.flatten(-3, -2) @ since.mT).unflatten(-2, (run, len(lefts)))
        first, second = found.unflatten(-4, (-1, 2)).unbind(-4)
        found = torch.cat([F.pad(first, (0, run)), torch.cat([across, second], -1)], -3)
        run *= 2
    return found[..., 0, :size, :, :size].unbind(-2)

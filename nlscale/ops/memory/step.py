"""One token of every row by the recurrence itself (docs/concepts/memory.md), without a derivative.

The chunk form of the scan makes one token of a chunk that was begun before dear: it is some forty
operations on matrices of one row. What is here are the four or five products that the recurrence
takes, on memories that are written in place. Rows may be anywhere in a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.ops.memory.rules import MemoryRules, MemoryState, MemoryWeights
from nlscale.ops.one_token import unit


class MemoryStep:
    """What depends on the weights alone is worked out once."""

    def __init__(
        self, weights: MemoryWeights | None, rules: MemoryRules, dtype: torch.dtype
    ) -> None:
        """Args are those of `nlscale.ops.memory.scan.memory_scan`, and the dtype to compute in."""
        self.rules, self.unit = rules, unit(dtype)
        self.kept = torch.tensor([0, 1], dtype=dtype)
        self.additive = weights is not None and weights.lambda_key is not None
        self.makers: Tensor | None = None
        self.read: Tensor | None = None
        if weights is None:
            return
        key, value = weights.key, weights.value
        if weights.lambda_key is not None and weights.lambda_value is not None:
            key = weights.lambda_key[:, None, None] * key
            value = weights.lambda_value[:, None, None] * value
        # [M_k; m_eta; m_alpha] and [M_v; 0] of each head, transposed: one product for both
        self.makers = torch.stack(
            [torch.cat([key, weights.gates], 1), torch.cat([value, 0 * weights.gates], 1)], 1
        ).flatten(0, 1).mT.contiguous()  # fmt: skip
        if weights.read is not None:
            self.read = weights.read.mT.contiguous()

    def __call__(
        self, fed: Tensor, q: Tensor, gates: Tensor, state: MemoryState, active: Tensor | None
    ) -> Tensor:
        """Write and read.

        Args:
            fed: a and b, what feeds k and v, [batch, heads, 2, d].
            q: queries of unit norm, [batch, heads, d].
            gates: static logits of eta and alpha, [batch, heads, 2].
            state: `current`, which is written to, and `start` share no memory and are contiguous;
                `position` stays (`advance`).
            active: rows that read their token, bool [batch]; the others stay. None: all.

        Returns:
            The reads, [batch, heads, d].
        """
        batch, heads, _, d = fed.shape
        rules, count = self.rules, batch * heads
        current = state.current.view(count, -1, d)
        makes, k_v = None, fed
        if self.makers is not None:
            assert state.start is not None, "what is learned is carried"
            makes = state.start.view(count, d, d).mT
            k_v, gates = self._made(fed, gates, makes)
        opened = torch.sigmoid(gates)
        if active is not None:
            opened = torch.where(active[:, None, None], opened, self.kept.to(opened.device))
        eta, alpha = opened.reshape(count, 2, 1, 1).unbind(1)
        eta = eta * rules.strength
        v = k_v[:, :, 1]
        if rules.normalize_value:
            k, u = self.unit(k_v).unbind(2)
        else:
            k, u = self.unit(k_v[:, :, 0]), v
        k_row = k.reshape(count, 1, d)
        if rules.decayed_write:
            self._decay(current, alpha)
        # [Pi k, S k]
        error = torch.bmm(k_row, current.mT).neg_() if rules.erases else torch.zeros_like(k_row)
        if makes is not None:
            target = torch.sub(u, k, alpha=rules.c) if rules.c else u
            error[..., :d].baddbmm_(target.reshape(count, 1, d), makes)
        if rules.main_memory:
            error[..., -d:].add_(v.reshape(count, 1, d))
        if not rules.decayed_write:
            self._decay(current, alpha)
        current.addcmul_(error.mul_(eta).mT, k_row)
        read = torch.bmm(q.reshape(count, 1, d), current[:, -d:].mT).view(batch, heads, d)
        if self.read is None:
            return read
        return torch.bmm(read.transpose(0, 1), self.read).transpose(0, 1)

    def _decay(self, current: Tensor, alpha: Tensor) -> None:
        """Of [Pi; S], in place; by alpha, [N, 1, 1]."""
        current.mul_(alpha)
        if self.rules.anchored and self.makers is not None:
            pi = current[:, : current.shape[-1]]
            pi.diagonal(dim1=1, dim2=2).add_(1 - alpha[:, 0])

    def _made(self, fed: Tensor, gates: Tensor, makes: Tensor) -> tuple[Tensor, Tensor]:
        """k and v before they are normalised, [batch, heads, 2, d], and the logits of the gates."""
        assert self.makers is not None
        batch, heads, _, d = fed.shape
        moved = torch.bmm(fed.view(batch * heads, 2, d), makes)
        by_head = moved.view(batch, heads * 2, d).transpose(0, 1)
        made = torch.bmm(by_head, self.makers).view(heads, 2, batch, d + 2).permute(2, 0, 1, 3)
        gates = gates + made[:, :, 0, d:]
        return fed + made[..., :d] if self.additive else made[..., :d], gates


def advance(state: MemoryState, chunk: int, active: Tensor | None) -> None:
    """Count the token just read, and begin a chunk in the rows that have ended theirs.

    Args:
        state: written in place.
        chunk: tokens of a chunk.
        active: rows that have read it, bool [batch], on the CPU; None: all.
    """
    position = state.position.add_(1 if active is None else active)
    if chunk not in position.tolist():
        return
    (rows,) = torch.nonzero(position == chunk, as_tuple=True)
    position[rows] = 0
    if state.start is not None:
        rows, d = rows.to(state.start.device), state.start.shape[-1]
        state.start[rows] = state.current[rows, :, :d]

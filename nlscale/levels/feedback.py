"""Sums over the nodes as integers, and what rounding has left of them for the next ones.

In two hops (docs/concepts/windows.md): each node rounds its sum s with what it still owes, e, and
sends every part of it to the node that adds that part up. That one rounds the total t of what has
arrived, in fp32, with what it owes of it, E, and sends it to all, itself included:

    sent  Q(s + e)       kept  e <- s + e - Q(s + e)              by each node, of all of the shard
    sent  Q(t + E)       kept  E <- t + E - Q(t + E)              by the owner, of its part

So all nodes hold the same bits. An update divides what has arrived by the targets of its window:
what a window has left is a part of a mean, and enters a sum of W tokens, left by one of W_0, times
W / W_0 (`nlscale.levels.owing`; nothing is done where they are equal). So at any moment, to fp32
rounding,

    sum over windows of sent / W  +  (sum_i e_i + E) / W_last  =  sum over windows of gradients / W

with W the tokens that a window holds when it begins to cross, those planned for its last step among
them: of the verdict on that step nothing is known yet. With `parallel.shard_optimizer` all or
matrices the owner keeps the total, which is not rounded again, and there is no E.

What is made of e and E is kept beside them until the step that crossed is known to be admitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.levels.homes import Cut
from nlscale.levels.spectrum import BLOCK, ROUNDED_AT_ONCE
from nlscale.ops.quantize.blocks import pack, unpack
from nlscale.ops.quantize.rows import Rows, row_bytes

_PIECE = ROUNDED_AT_ONCE // 8
"""Elements that cross at a time: of each no more than 1.04 bytes to send, as many that arrive and
that come back, and of the part that this node adds up 4 for the total and 1.04 for its integers."""


class Owed:
    """What the crossings of a window have left to be sent.

    Args:
        shards: of the window, fp32.
        owned: of each shard the part that this node adds up and sends to all, start and end; None:
            it keeps the sums.
        rounds: whether it is to cross as integers. If not, what a checkpoint has brought is here,
            and goes as it is with the next sums.
    """

    def __init__(
        self, shards: list[Tensor], owned: list[tuple[int, int]] | None, rounds: bool
    ) -> None:
        self.owned = owned
        sizes = [shard.numel() for shard in shards]
        parts = [end - start for start, end in owned or []]
        self._kept = shards[0].new_zeros(sum(sizes) + sum(parts))
        self._made = torch.zeros_like(self._kept) if rounds else None
        number = len(shards)
        self.errors = list(self._kept.split([*sizes, *parts]))[:number]
        """e: of each shard, all of it."""
        self.totals = list(self._kept.split([*sizes, *parts]))[number:]
        """E: of each shard, the part that this node owns; empty where it keeps the sums."""
        made = [] if self._made is None else list(self._made.split([*sizes, *parts]))
        self.errors_made, self.totals_made = made[:number], made[number:]
        """What becomes of them with the crossing under way."""

    def add_to(self, shard: Tensor, i: int) -> None:
        """Send it all, as it is, with what shard i holds."""
        shard.add_(self.errors[i])
        if self.owned is not None:
            shard[slice(*self.owned[i])].add_(self.totals[i])

    def multiply(self, factor: float) -> None:
        """Of what is kept, make that much."""
        self._kept.mul_(factor)

    def settle(self, accepted: Tensor) -> None:
        """After a crossing, keep what it has left; where it was in vain, what was before.

        Args:
            accepted: whether an update, or a window's sum, has what has crossed; bool [].
        """
        if self._made is None:
            self._kept.masked_fill_(accepted, 0.0)
        else:  # not by arithmetic: of a step that is not admitted it may be NaN
            torch.where(accepted, self._made, self._kept, out=self._kept)

    def gather(self) -> None:
        """Move what this node owes as an owner to what it owes as a node: of both only the sum over
        all nodes has a meaning for another layout."""
        for i, total in enumerate(self.totals):
            assert self.owned is not None
            self.errors[i][slice(*self.owned[i])].add_(total)
            total.zero_()

    def share(self, nodes: int) -> None:
        """Of what every node holds the whole of, leave each of so many an equal part."""
        for error in self.errors:
            error.div_(nodes)


class _Round:
    """What crosses of a shard at a time: of each node's part a range, or nothing.

    Args:
        pieces: of each node, start and length.
        node: this one.
        bits: of an integer.
        device: of the shard.
    """

    def __init__(
        self, pieces: list[tuple[int, int]], node: int, bits: int, device: torch.device
    ) -> None:
        sizes = [row_bytes(length, bits, BLOCK) for _, length in pieces]
        self.mine = pieces[node]
        own = [(0, self.mine[1])]
        self.out, self.own = (Rows.of(each, bits, BLOCK, device) for each in (pieces, own))
        self.sent, self.arriving = sizes, [sizes[node]] * len(pieces)
        # Back they come by an all-gather, which takes rows of one length.
        self.again, self.back = (
            Rows.of(each, bits, BLOCK, device, stride=max(sizes)) for each in (own, pieces)
        )
        self.bytes_out = sum(sizes) - sizes[node]
        self.bytes_back = (len(pieces) - 1) * max(sizes)


class Packed:
    """How one shard crosses as integers.

    Args:
        cut: of the shard: what each node adds up.
        node: this one.
        bits: of an integer.
        owed: of the window.
        i: which of its shards it is.
        kernels: whether those for GPUs may be used.
    """

    def __init__(
        self, cut: Cut, node: int, bits: int, owed: Owed, i: int, kernels: bool = True
    ) -> None:
        most = max(BLOCK, _PIECE // len(cut) // BLOCK * BLOCK)
        device = owed.errors[i].device
        pieces = [[piece for part in parts for piece in _pieces(part, most)] for parts in cut]
        together = zip_longest(*pieces, fillvalue=(0, 0))
        self._rounds = [_Round(list(each), node, bits, device) for each in together]
        self._owed, self._i, self._nodes, self._kernels = owed, i, len(cut), kernels
        self._begin = None if owed.owned is None else owed.owned[i][0]

    @property
    def bytes(self) -> int:
        """That this node sends to others when the shard crosses."""
        comes_back = self._begin is not None
        return sum(r.bytes_out + r.bytes_back * comes_back for r in self._rounds)

    def sum(self, shard: Tensor, group: dist.ProcessGroup) -> None:
        """Sum it over the nodes, in place; where the owner keeps the sum, in its part alone."""
        owed, i, kernels = self._owed, self._i, self._kernels
        for r in self._rounds:
            sent = pack(shard, owed.errors[i], owed.errors_made[i], r.out, kernels)
            arrived = torch.empty(sum(r.arriving), dtype=torch.uint8, device=shard.device)
            dist.all_to_all_single(arrived, sent, r.arriving, r.sent, group=group)
            start, length = r.mine
            if self._begin is None:
                unpack(arrived, r.own, shard[start : start + length], self._nodes, kernels)
                continue
            total = shard.new_empty(length)
            unpack(arrived, r.own, total, self._nodes, kernels)
            here = slice(start - self._begin, start - self._begin + length)
            mine = pack(total, owed.totals[i][here], owed.totals_made[i][here], r.again, kernels)
            back = torch.empty(r.back.bytes, dtype=torch.uint8, device=shard.device)
            dist.all_gather_into_tensor(back, mine, group=group)
            unpack(back, r.back, shard, kernels=kernels)


def _pieces(part: slice, most: int) -> Sequence[tuple[int, int]]:
    """Start and length of pieces of a part, each of no more than so many elements."""
    starts = range(part.start, part.stop, most)
    return [(start, min(most, part.stop - start)) for start in starts]

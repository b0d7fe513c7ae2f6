"""A matrix that changes while a sequence is read, chunk by chunk, in closed form.

Of each sequence, with hidden units h and targets v, sums over the C tokens of a chunk i, and decay
rho (docs/concepts/context.md):

    D_j = sum_{i<j} rho^(j-1-i) V_i^T H_i / C,      y_t = D_j h_t   for the tokens t of chunk j

so D_0 = 0 and D_{j+1} = rho D_j + V_j^T H_j / C: one scan over the chunks, each step of which is
products of whole chunks. What a chunk reads does not depend on what is in it, nor on what follows.

Backward, with dY_j the gradient of a chunk's outputs and G_j that of D_j,

    G_j = dY_j^T H_j + rho G_{j+1},   dV_j = H_j G_{j+1}^T / C,   dH_j = dY_j D_j + V_j G_{j+1} / C

a scan forward for D, which is made again rather than kept, and one back for G. So h and v are all
that is kept, and one D of each sequence is there at a time. D and G are summed in at least fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.by_hand import wide
from nlscale.ops.documents import Documents


@dataclass(frozen=True)
class Offset:
    """Where the tokens of a piece, whose rows go on inside a chunk, each elsewhere, stand in rows
    of whole chunks; as `Documents` has it."""

    source: Tensor
    filling: Tensor
    place: Tensor

    @classmethod
    def of(cls, position: Tensor, read: Tensor, length: int, chunk: int, device: Any) -> Offset:
        """Args: tokens of the open chunk of each row, and how many it reads, int64 [batch] on the
        CPU; tokens of the piece; those of a chunk; where it is."""
        filled = -(-(int(position.max()) + length) // chunk) * chunk
        time = torch.arange(filled) - position[:, None]
        filling = (time < 0) | (time >= read[:, None])
        place = position[:, None] + torch.arange(length)
        return cls(time.clamp(0, length - 1).to(device), filling.to(device), place.to(device))


class Change(NamedTuple):
    """Where a piece ended: D, and the sum V^T H of the open chunk, each [batch, out, hidden]."""

    change: Tensor
    opened: Tensor
    position: Tensor
    """Tokens of the open chunk, int64 [batch], on the CPU."""


def changed(
    h: Tensor, v: Tensor, chunk: int, decay: float, filled: Documents | None = None
) -> Tensor:
    """What the change adds to a matrix's product with h.

    Args:
        h: hidden units, [sequence, batch, hidden].
        v: targets, [sequence, batch, out].
        chunk: C.
        decay: rho.
        filled: `Documents` in chunks of C, at each of which D begins anew; None: rows are one.

    Returns:
        [sequence, batch, out].
    """
    carried = None if filled is None else filled.carried
    return _Changed.apply(h, v, _Scan(chunk, decay, filled, carried), None)  # type: ignore[no-any-return]


def changed_on(
    h: Tensor, v: Tensor, chunk: int, decay: float, state: Change | None, lengths: Tensor | None
) -> tuple[Tensor, Change]:
    """The same of the next piece of the sequences.

    Args:
        h, v, chunk, decay: as `changed`.
        state: where the last piece ended; None at the start.
        lengths: how many of its tokens each row reads, int64 [batch], on the CPU; None: all.

    Returns:
        [sequence, batch, out], and where the piece ends, which knows no gradient.
    """
    length, batch, hidden = h.shape
    if state is None:
        empty = h.new_zeros(batch, v.shape[-1], hidden, dtype=wide(h))
        state = Change(empty, torch.zeros_like(empty), torch.zeros(batch, dtype=torch.long))
    read = torch.full((batch,), length) if lengths is None else lengths
    end = state.position + read
    closed = end // chunk
    filled = None
    if lengths is not None or bool(state.position.any()):
        filled = Offset.of(state.position, read, length, chunk, h.device)
    scan = _Scan(chunk, decay, filled, None, closed)
    y = _Changed.apply(h, v, scan, state)
    assert scan.end is not None
    return y, Change(*scan.end, end % chunk)


class _Scan:
    """What a scan does, beside what it is given: how rows are cut, and how D goes on."""

    def __init__(
        self,
        chunk: int,
        decay: float,
        filled: Documents | Offset | None,
        carried: Tensor | None,
        closed: Tensor | None = None,
    ) -> None:
        """`closed`: how many chunks each row ends, int64 [batch], on the CPU; None: the end of the
        rows is not asked for."""
        self.chunk, self.decay, self.filled = chunk, decay, filled
        self.carried, self.closed = carried, closed
        self.end: tuple[Tensor, Tensor] | None = None

    def split(self, x: Tensor) -> Tensor:
        """[sequence, batch, n] -> [chunks, batch, C, n], zero where no token stands."""
        length, batch, n = x.shape
        if self.filled is None:
            count = -(-length // self.chunk)
            if count * self.chunk > length:
                x = torch.cat([x, x.new_zeros(count * self.chunk - length, batch, n)])
            return x.view(count, self.chunk, batch, n).transpose(1, 2)
        source = _rows(self.filled.source, length, batch)
        x = x.flatten(0, 1).index_select(0, source.flatten()).view(*source.shape, n)
        x = x.masked_fill_(self.filled.filling.T[..., None], 0)
        return x.view(-1, self.chunk, batch, n).transpose(1, 2)

    def join(self, x: Tensor, length: int) -> Tensor:
        """The tokens of [chunks, batch, C, n], [sequence, batch, n]."""
        count, batch, chunk, n = x.shape
        x = x.transpose(1, 2).reshape(count * chunk, batch, n)
        if self.filled is None:
            return x[:length].contiguous()
        place = _rows(self.filled.place, count * chunk, batch)
        return x.flatten(0, 1).index_select(0, place.flatten()).view(length, batch, n)

    def kept(self, chunk: int) -> Tensor | float:
        """What is left of D where that chunk begins, beside the decay: 0 of a new document."""
        return 1.0 if self.carried is None else self.carried[:, chunk, None, None]

    def after(self, change: Tensor | None, added: Tensor, chunk: int) -> Tensor:
        """D of that chunk, from that of the one before and its sum."""
        change = added / self.chunk if change is None else self.decay * change + added / self.chunk
        return change if self.carried is None else change * self.kept(chunk)


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor, scan: _Scan, state: Change | None) -> Tensor:
        ctx.scan = scan
        change, opened = (None, None) if state is None else state[:2]
        ctx.save_for_backward(h, v, change, opened)
        hs, vs = scan.split(h), scan.split(v)
        count, dtype = len(hs), wide(h)
        y = vs.new_zeros(vs.shape)
        end = None if opened is None else torch.zeros_like(opened)
        for j in range(count):
            if change is not None:
                y[j] = hs[j] @ change.mT.to(h.dtype)
            if j + 1 == count and end is None:
                break
            added = (vs[j].mT @ hs[j]).to(dtype)
            if opened is not None and j == 0:
                added = added + opened
            after = scan.after(change, added, j + 1)
            if end is None:
                change = after
                continue
            assert scan.closed is not None and change is not None
            closed, at = ((rows.to(h.device))[:, None, None] for rows in _at(scan.closed, j))
            end = torch.where(at, added, end)
            change = torch.where(closed, after, change)
        if end is not None:
            assert change is not None
            scan.end = change, end
        return scan.join(y, len(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
        scan: _Scan = ctx.scan
        h, v, change, opened = ctx.saved_tensors
        hs, vs, ys = scan.split(h), scan.split(v), scan.split(d[0])
        count, dtype = len(hs), wide(h)
        d_h, d_v = torch.zeros_like(hs), torch.zeros_like(vs)
        for j in range(count):
            if change is not None:
                d_h[j] = ys[j] @ change.to(h.dtype)
            if j + 1 < count:
                added = (vs[j].mT @ hs[j]).to(dtype)
                if opened is not None and j == 0:
                    added = added + opened
                change = scan.after(change, added, j + 1)
        gradient: Tensor | None = None  # of the D that the chunk reads, as the scan left it
        for j in range(count - 1, 0, -1):
            own = (ys[j].mT @ hs[j]).to(dtype)
            gradient = own if gradient is None else own + scan.decay * gradient
            gradient = gradient * scan.kept(j)
            of_sum = (gradient / scan.chunk).to(h.dtype)
            d_v[j - 1] = hs[j - 1] @ of_sum.mT
            d_h[j - 1] += vs[j - 1] @ of_sum
        return scan.join(d_h, len(h)), scan.join(d_v, len(h)), None, None


def _at(closed: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Which rows end this chunk, and in which it stays open."""
    return closed > chunk, closed == chunk


def _rows(index: Tensor, length: int, batch: int) -> Tensor:
    """Places [batch, time] of rows [length, batch] that are one after another, [time, batch]."""
    return index.T * batch + torch.arange(batch, device=index.device)

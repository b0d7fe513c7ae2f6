"""How a piece of the sequences is cut into runs of chunks of equal size.

A chunk is part of the model, so that a piece is up to three runs: the rest of the chunk that an
earlier piece has begun, the whole chunks, and the beginning of one more. Where rows differ, in how
far into a chunk they are or in how much they read, a run has as many chunks as the row with the
most, and the tokens of the others are filled up with ones that change nothing: no key, a write
strength of 0 and a decay of 1. So there are three runs whatever the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CLOSED = 1e4
"""A logit whose sigmoid is 0, and 1 of its negative, without rounding in any precision."""


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of equal size."""

    count: int
    size: int
    """Tokens of each chunk."""
    begun: bool
    """Whether an earlier piece has begun the chunk."""
    renews: bool | Tensor
    """Whether a chunk begins after the run; of each row, bool [batch, 1, 1, 1], where they differ.
    """

    def ends(self, stands: Tensor | None) -> list[bool | Tensor]:
        """Of each of its chunks, whether it ends with its last place; of each row, bool
        [batch, 1, 1, 1], where they differ. `stands` is the piece's, of this run."""
        if self.count == 1 or stands is None:
            return [self.renews] * self.count
        whole = stands[:, self.size - 1 :: self.size, None, None, None]
        return [*whole.unbind(1)]

    def renewed(self, start: Tensor, pi: Tensor) -> Tensor:
        """Pi at the start of the current chunk, after the run."""
        if isinstance(self.renews, Tensor):
            return torch.where(self.renews, pi, start)
        return pi if self.renews else start


@dataclass(frozen=True)
class Piece:
    """A piece of the sequences of which every row is cut alike."""

    runs: list[Run]
    position: Tensor
    """Tokens of its chunk that each row has written after the piece, int64 [batch], on the CPU."""

    def parts(self, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tokens of each run, of a, b, q, eta and alpha, [batch, heads, time, ...]."""
        if not self.runs:
            return iter(())
        # split, not slices: the backward of a slice fills a tensor of the whole length with zeros
        lengths = [run.count * run.size for run in self.runs]
        return zip(*(x.split(lengths, dim=2) for x in inputs), strict=True)

    def stands(self) -> list[Tensor | None]:
        """Of each run, where there is a token, bool [batch, places]; None: everywhere."""
        return [None for _ in self.runs]

    def joined(self, reads: list[Tensor]) -> Tensor:
        """What the tokens read, [batch, heads, time, d], of what each run read."""
        return reads[0] if len(reads) == 1 else torch.cat(reads, dim=2)


@dataclass(frozen=True)
class RaggedPiece(Piece):
    """One whose rows differ."""

    source: Tensor
    """Token that stands at each place of the runs, one after the other, int64 [batch, places]."""
    filling: Tensor
    """Places at which none stands, bool [batch, places]."""
    place: Tensor
    """Place of each token, int64 [batch, time]; of one that is not read, any."""

    def parts(self, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        a, b, q, eta, alpha = (_along(x, self.source) for x in inputs)
        some, all_ = self.filling[:, None], self.filling[:, None, :, None]
        of_gates = some if eta.dim() == 3 else all_  # of a head, or of channels
        filled = (
            *(x.masked_fill(all_, 0) for x in (a, b, q)),
            eta.masked_fill(of_gates, -_CLOSED),
            alpha.masked_fill(of_gates, _CLOSED),
        )
        return super().parts(*filled)

    def stands(self) -> list[Tensor | None]:
        return [*(~self.filling).split([run.count * run.size for run in self.runs], dim=1)]

    def joined(self, reads: list[Tensor]) -> Tensor:
        return _along(super().joined(reads), self.place)


def whole_piece(batch: int, length: int, chunk: int) -> Piece:
    """How a piece is cut that every row reads whole, at its start."""
    return _alike(0, batch, length, chunk)


def piece_of(
    position: Tensor, length: int, lengths: Tensor | None, chunk: int, device: torch.device
) -> Piece:
    """How a piece is cut.

    Args:
        position: tokens of its current chunk that each row has written, int64 [batch], on the CPU.
        length: tokens of the piece, those that no row reads included.
        lengths: how many of them each row reads, int64 [batch], on the CPU; None: all.
        chunk: tokens of a chunk.
        device: where the sequences are.
    """
    read = [length] * len(position) if lengths is None else lengths.tolist()
    at = position.tolist()
    if len(set(at)) == 1 and set(read) == {length}:
        return _alike(at[0], len(at), length, chunk)
    return _ragged(position, length, torch.tensor(read), chunk, device)


def _alike(position: int, batch: int, length: int, chunk: int) -> Piece:
    first = min(-position % chunk, length)
    whole, rest = divmod(length - first, chunk)
    runs = [
        Run(1, first, begun=True, renews=position + first == chunk),
        Run(whole, chunk, begun=False, renews=True),
        Run(1, rest, begun=False, renews=False),
    ]
    after = torch.full((batch,), (position + length) % chunk, dtype=torch.long)
    return Piece([run for run in runs if run.count * run.size], after)


def _ragged(
    position: Tensor, length: int, lengths: Tensor, chunk: int, device: torch.device
) -> Piece:
    first = torch.minimum(-position % chunk, lengths)
    whole, rest = (lengths - first) // chunk, (lengths - first) % chunk
    every = (  # chunks, tokens of each, tokens of each row, and whether a chunk then begins
        (1, int(first.max()), first, position + first == chunk),
        (int(whole.max()), chunk, whole * chunk, whole > 0),
        (1, int(rest.max()), rest, torch.zeros_like(rest, dtype=torch.bool)),
    )
    runs, source, filling = [], [], []
    time, place = torch.arange(length), torch.zeros(len(position), length, dtype=torch.long)
    before, begin = 0, torch.zeros_like(first)[:, None]
    for count, size, read, renews in every:
        end = begin + read[:, None]
        if count * size:
            runs.append(Run(count, size, read is first, renews[:, None, None, None].to(device)))
            at = torch.arange(count * size)
            filling.append(at >= read[:, None])
            source.append((begin + at).masked_fill(filling[-1], 0))
            here = (time >= begin) & (time < end)
            place = torch.where(here, before + time - begin, place)
        before, begin = before + count * size, end
    if not runs:
        return Piece(runs, position.clone())
    indices = torch.cat(source, 1), torch.cat(filling, 1), place
    return RaggedPiece(runs, (position + lengths) % chunk, *(x.to(device) for x in indices))


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, heads, time, ...] at index [batch, places]."""
    index = index[:, None] if x.dim() == 3 else index[:, None, :, None]
    return x.take_along_dim(index, 2)

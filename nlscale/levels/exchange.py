"""Whole matrices for the optimizer rules that need them, made of the ranges that ranks hold.

Each matrix has one owner among the ranks that hold its ranges: the tensor-parallel ranks, and the
data-parallel ranks over which the optimizer's state is spread. Ranges go there by one all-to-all
and are joined, and what a rule makes of them goes back by another. A section of a joined projection
is a matrix of its own, and so is each head of [heads, out, in]: orthogonalised as a rank has it,
cut at the border of tensor ranks, an update would be another one.

Which matrix is whose follows from the sizes alone: the largest first, to the rank with least to do.
So nodes that hold the same state compute the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.levels.wire import Wire
from nlscale.optim.matrices import OfMatrices, Ranges


@dataclass(frozen=True)
class MatrixRange:
    """What this rank holds of a parameter whose matrices are to be whole."""

    name: str
    start: int
    """Where it begins in the flattened part of this tensor rank."""
    values: Tensor
    """fp32 [length], as the optimizer holds it."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a matrix."""

    rank: int
    """In the group."""
    part: int
    """Of the matrix: the tensor rank whose part it lies in."""
    at: slice
    """Where, in that part, flattened."""
    of_range: slice
    """Where, in what the rank holds of the parameter."""
    sent: bool
    """Else another rank sends the same, and this one only gets what comes back."""

    @property
    def length(self) -> int:
        return self.at.stop - self.at.start  # type: ignore[no-any-return]


@dataclass
class Matrix:
    """A matrix, and where it lies."""

    name: str
    """Of its parameter."""
    depth: int
    """Of the block, from 0."""
    shape: tuple[int, int]
    """Of the whole: [out, in]."""
    dim: int
    """Along which its parts are joined."""
    parts: dict[int, int]
    """Of each tensor rank that has a part: where that begins in the flattened parameter."""
    copied: bool = False
    """Whether all tensor ranks have the same."""
    pieces: list[Piece] = field(default_factory=list)
    owner: int = 0
    """Rank in the group."""

    @property
    def part_shape(self) -> list[int]:
        shape = list(self.shape)
        shape[self.dim] //= len(self.parts)
        return shape

    @property
    def part_size(self) -> int:
        out, into = self.part_shape
        return out * into

    @property
    def work(self) -> int:
        """Of orthogonalising it, in proportion."""
        return self.shape[0] * self.shape[1] * min(self.shape)


class MatrixExchange:
    """The exchange of one sync group (`nlscale.optim.matrices.Exchange`).

    Args:
        parameters: those whose matrices are to be whole, this tensor rank's parts by name, tagged
            (`nlscale.model.init.tag`); the same on every rank of the group.
        depths: of the block of each.
        ranges: what this rank holds of them; of some it may hold nothing.
        group: the ranks that together hold them; None: this rank alone.
        tensor: this tensor rank, and how many there are.
        dtype: in which matrices travel and are worked on.
        node: of this rank, among those of the group.
        wire: counts what goes to other nodes.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        depths: dict[str, int],
        ranges: list[MatrixRange],
        group: dist.ProcessGroup | None,
        tensor: tuple[int, int],
        dtype: torch.dtype,
        node: int = 0,
        wire: Wire | None = None,
    ) -> None:
        self._wire, self._elsewhere = wire, list[int]()
        # Of the parameters: a rank that holds no range of them owns matrices all the same.
        self._device = next(iter(parameters.values())).device
        self.ranges = [own.values for own in ranges]
        self.depths = [depths[own.name] for own in ranges]
        self._group, self._dtype = group, dtype
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self._index = {own.name: i for i, own in enumerate(ranges)}
        self._matrices = [
            m for n, p in parameters.items() for m in _matrices(n, p, depths[n], tensor)
        ]
        held = {own.name: (own.start, own.values.numel()) for own in ranges}
        self._find_pieces(held, tensor[0], node)
        _deal(self._matrices, self._size)
        # Here and not at each update: what is copied to a GPU from a list holds up the host.
        sizes = [float(m.shape[0] * m.shape[1]) for m in self._matrices]
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=self._device)
        self._traffic: dict[frozenset[int], _Traffic] = {}

    def on_whole(
        self,
        given: Sequence[Ranges],
        function: OfMatrices,
        results: int = 1,
        depths: Iterable[int] | None = None,
    ) -> list[list[Tensor]]:
        """`function` of whole matrices, at their owners, handed back as ranges.

        All ranks of the group call it alike.

        Args:
            given: of each argument, the values at this rank's ranges.
            function: (matrices of one shape [number, out, in], ...) -> that many such stacks.
            results: how many.
            depths: of the matrices in these blocks alone; ranges elsewhere come back as zeros.

        Returns:
            Of each result the values at this rank's ranges, fp32.
        """
        chosen = frozenset(m.depth for m in self._matrices) if depths is None else frozenset(depths)
        if chosen not in self._traffic:
            self._traffic[chosen] = _Traffic(self._matrices, chosen, self._rank, self._size)
        traffic = self._traffic[chosen]
        whole = [self._gathered(values, traffic) for values in given]
        found: list[list[Tensor]] = [[torch.empty(0)] * len(traffic.mine) for _ in range(results)]
        for indices in traffic.by_shape:
            stacks = function(*(torch.stack([matrices[i] for i in indices]) for matrices in whole))
            for result, stack in zip(found, stacks, strict=True):
                for i, matrix in zip(indices, stack.to(self._dtype), strict=True):
                    result[i] = matrix
        return [self._handed_back(matrices, traffic) for matrices in found]

    def of_matrix(self, ranges: Ranges, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Ranges, of each matrix times `function` of the mean of its squares, fp32 [matrices]."""
        squares = torch.zeros_like(self._sizes)
        mine = [
            (i, p) for i, m in enumerate(self._matrices) for p in m.pieces if p.rank == self._rank
        ]
        for i, piece in mine:
            if piece.sent:
                values = self._of_piece(ranges, self._matrices[i], piece)
                squares[i] = values.double().square().sum()
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        factors = function((squares / self._sizes).float())
        scaled = [torch.zeros_like(x) for x in ranges]
        for i, piece in mine:
            matrix = self._matrices[i]
            values = self._of_piece(ranges, matrix, piece)
            self._of_piece(scaled, matrix, piece).copy_(values * factors[i])
        return scaled

    def _of_piece(self, ranges: Ranges, matrix: Matrix, piece: Piece) -> Tensor:
        return ranges[self._index[matrix.name]][piece.of_range]

    def _find_pieces(self, held: dict[str, tuple[int, int]], tensor_rank: int, node: int) -> None:
        mine = (tensor_rank, node, held)
        everyone: list[Any] = [mine]
        if self._group is not None:
            everyone = [None] * self._size
            dist.all_gather_object(everyone, mine, group=self._group)
        self._elsewhere = [r for r, (_, other, _) in enumerate(everyone) if other != node]
        for matrix in self._matrices:
            size = matrix.part_size
            for rank, (of_tensor, _, ranges) in enumerate(everyone):
                part = 0 if matrix.copied else of_tensor
                if part not in matrix.parts or matrix.name not in ranges:
                    continue
                start, length = ranges[matrix.name]
                begin = matrix.parts[part]
                low, high = max(start, begin), min(start + length, begin + size)
                if low < high:
                    at, inside = slice(low - begin, high - begin), slice(low - start, high - start)
                    sent = not matrix.copied or of_tensor == 0
                    matrix.pieces.append(Piece(rank, part, at, inside, sent))

    def _gathered(self, values: Ranges, traffic: _Traffic) -> list[Tensor]:
        """The matrices that this rank owns."""
        pieces = [self._of_piece(values, m, p).to(self._dtype) for m, p in traffic.outgoing]
        arrived = self._all_to_all(pieces, traffic.sent, traffic.received)
        found = []
        for matrix, parts in zip(traffic.mine, traffic.arriving, strict=True):
            flat = [torch.cat([arrived[where] for where in places]) for places in parts]
            found.append(torch.cat([part.view(matrix.part_shape) for part in flat], matrix.dim))
        return found

    def _handed_back(self, matrices: list[Tensor], traffic: _Traffic) -> list[Tensor]:
        """This rank's ranges of matrices that the owners have."""
        flat = [
            dict(zip(own.parts, matrix.chunk(len(own.parts), own.dim), strict=True))
            for own, matrix in zip(traffic.mine, matrices, strict=True)
        ]
        pieces = [flat[i][piece.part].reshape(-1)[piece.at] for i, piece in traffic.handed_back]
        arrived = self._all_to_all(pieces, traffic.handed, traffic.returned)
        found = [torch.zeros_like(x) for x in self.ranges]
        begin = 0
        for matrix, piece in traffic.returning:
            values = arrived[begin : begin + piece.length]
            self._of_piece(found, matrix, piece).copy_(values)
            begin += piece.length
        return found

    def _all_to_all(self, pieces: list[Tensor], sent: list[int], received: list[int]) -> Tensor:
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        outgoing = torch.cat(pieces) if pieces else empty
        if self._group is None:
            return outgoing
        arrived = torch.empty(sum(received), dtype=self._dtype, device=self._device)
        size = self._dtype.itemsize
        if self._wire is not None:
            self._wire.bytes += size * sum(sent[rank] for rank in self._elsewhere)
        dist.all_to_all_single(  # as bytes, which every backend can send
            arrived.view(torch.uint8),
            outgoing.view(torch.uint8),
            [n * size for n in received],
            [n * size for n in sent],
            group=self._group,
        )
        return arrived


class _Traffic:
    """Who sends what to whom for some matrices, in the order in which it lies in the buffers: by
    the rank at the other end, then by matrix."""

    def __init__(
        self, matrices: list[Matrix], depths: frozenset[int], rank: int, size: int
    ) -> None:
        matrices = [m for m in matrices if m.depth in depths]
        self.mine = [m for m in matrices if m.owner == rank]
        """That this rank owns."""
        dealt = sorted(matrices, key=lambda m: m.owner)
        own = [(m, p) for m in dealt for p in m.pieces if p.rank == rank]
        self.outgoing = [(m, p) for m, p in own if p.sent]
        self.returning = own
        coming = [(i, p) for r in range(size) for i, m in enumerate(self.mine) for p in m.pieces
                  if p.rank == r]  # fmt: skip
        self.handed_back = coming
        self.sent = _totals(size, [(m.owner, p.length) for m, p in self.outgoing])
        self.returned = _totals(size, [(m.owner, p.length) for m, p in own])
        self.received = _totals(size, [(p.rank, p.length) for _, p in coming if p.sent])
        self.handed = _totals(size, [(p.rank, p.length) for _, p in coming])
        self.arriving = self._arriving([(i, p) for i, p in coming if p.sent])
        """Of each own matrix, and each of its parts, where its pieces are in the buffer."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, matrix in enumerate(self.mine):
            shapes.setdefault(matrix.shape, []).append(i)
        self.by_shape = list(shapes.values())
        """Indices into `mine`."""

    def _arriving(self, coming: list[tuple[int, Piece]]) -> list[list[list[slice]]]:
        places: dict[tuple[int, int], list[tuple[int, slice]]] = {}
        begin = 0
        for i, piece in coming:
            where = slice(begin, begin + piece.length)
            places.setdefault((i, piece.part), []).append((piece.at.start, where))
            begin += piece.length
        return [
            [[where for _, where in sorted(places[i, part], key=_first)] for part in matrix.parts]
            for i, matrix in enumerate(self.mine)
        ]


def _first(pair: tuple[int, slice]) -> int:
    return pair[0]


def _totals(size: int, lengths: Iterable[tuple[int, int]]) -> list[int]:
    totals = [0] * size
    for rank, length in lengths:
        totals[rank] += length
    return totals


def _matrices(name: str, p: Any, depth: int, tensor: tuple[int, int]) -> list[Matrix]:
    """The matrices of a parameter of which this is one tensor rank's part."""
    split, ranks = p.tensor_model_parallel, range(tensor[1])
    if p.dim() == 3:
        heads, out, into = p.shape
        holders = ranks if split else range(1)
        return [
            Matrix(name, depth, (out, into), 0, {rank: head * out * into}, not split)
            for rank in holders
            for head in range(heads)
        ]
    rows, columns = p.shape
    if split and p.partition_dim == 1:
        return [Matrix(name, depth, (rows, columns * len(ranks)), 1, dict.fromkeys(ranks, 0))]
    holders = ranks if split else range(1)
    found, begin = [], 0
    for section in p.sections or (rows * len(holders),):
        starts = dict.fromkeys(holders, begin)
        found.append(Matrix(name, depth, (section, columns), 0, starts, not split))
        begin += section // len(holders) * columns
    return found


def _deal(matrices: list[Matrix], size: int) -> None:
    """Give each matrix an owner: the largest first, to the rank with least to do."""
    loads = [0] * size
    for matrix in sorted(matrices, key=lambda m: -m.work):  # stable: ties as they come
        matrix.owner = loads.index(min(loads))
        loads[matrix.owner] += matrix.work

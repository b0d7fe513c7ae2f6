"""Ranges of parameters as they lie on a rank, and boxes of the whole tensors that they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nlscale.checkpoint.store.pieces import Piece
from nlscale.model.init import full_shape
from nlscale.parallel.layout import Layout


@dataclass(frozen=True)
class Flat:
    """A range of a parameter's flattened local part, of one of the tensors that belong to it."""

    name: str
    """Of the tensor, such as `exp_avg/embedding.weight`."""
    parameter: Any
    """Tagged with how it is split over the tensor-parallel group."""
    start: int
    """Where the range begins in the local part."""
    data: Tensor
    """[length], contiguous."""

    def part(self, low: int, high: int) -> Flat:
        """Elements low .. high - 1 of the range, a view."""
        return replace(self, start=self.start + low, data=self.data[low:high])


def cut(flats: list[Flat], parts: int, part: int) -> list[Flat]:
    """One of equal parts, by bytes, of what lies one after the other.

    The parts are disjoint and are all of it, whoever asks for which, if the list is the same.

    Args:
        flats: of any lengths and dtypes.
        parts: how many there are.
        part: which, from 0.
    """
    total = sum(flat.data.nbytes for flat in flats)
    low, high = (total * k // parts for k in (part, part + 1))
    found, begin = [], 0
    for flat in flats:
        count, size = flat.data.numel(), flat.data.element_size()
        first, last = (min(max((at - begin) // size, 0), count) for at in (low, high))
        if first < last:
            found.append(flat.part(first, last))
        begin += flat.data.nbytes
    return found


def boxes(flat: Flat, layout: Layout) -> list[Piece]:
    """The boxes of the whole tensor that make up the range; views of it."""
    parameter, start = flat.parameter, flat.start
    shape = tuple(full_shape(parameter, layout.tensor_size))
    pieces = []
    for offsets, sizes, begin in _flat_boxes(
        tuple(parameter.shape), start, start + flat.data.numel()
    ):
        box = flat.data[begin - start : begin - start + math.prod(sizes)].view(sizes)
        if not parameter.tensor_model_parallel:
            pieces.append(Piece(flat.name, shape, offsets, box))
            continue
        dim = parameter.partition_dim
        first, last = offsets[dim], offsets[dim] + sizes[dim]
        local = whole = 0  # where a section begins, here and in the whole tensor
        for section in parameter.sections or (shape[dim],):
            share = section // layout.tensor_size
            low, high = max(first, local), min(last, local + share)
            if low < high:
                place = list(offsets)
                place[dim] = whole + layout.tensor_rank * share + low - local
                part = box.narrow(dim, low - first, high - low)
                pieces.append(Piece(flat.name, shape, tuple(place), part))
            local, whole = local + share, whole + section
    return pieces


Box = tuple[tuple[int, ...], tuple[int, ...], int]
"""Offsets and sizes of a box, and where it begins in the flattened array."""


def _flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes, in order, that make up the range start..stop of a flattened array."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    row = math.prod(shape[1:])
    first, rest = divmod(start, row)
    last = stop // row
    if rest or first == last:  # a row begun, or a range within one
        end = min(stop, (first + 1) * row)
        for offsets, sizes, begin in _flat_boxes(shape[1:], rest, end - first * row):
            yield (first, *offsets), (1, *sizes), begin + first * row
        yield from _flat_boxes(shape, end, stop)
        return
    yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), start
    yield from _flat_boxes(shape, last * row, stop)

"""Several documents in a row, each treated as if it stood alone.

A memory modifies itself at the chunks of its sequence (docs/concepts/memory.md), and so a document
that begins in the middle of a row begins a chunk: for the scan the last chunk of each document is
filled up with tokens that write nothing, and states start anew where the next one begins. All of it
is worked out on the host, from the tokens; a step waits for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlscale.ops.transfer import to_device


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro batch are, and where each begins a chunk."""

    position: Tensor
    """Tokens since the document began, int64 [batch, sequence]."""
    source: Tensor
    """Token that stands at each place of the filled rows, int64 [batch, filled]."""
    filling: Tensor
    """Places at which none stands, bool [batch, filled]."""
    place: Tensor
    """Place of each token in the filled rows, int64 [batch, sequence]."""
    carried: Tensor
    """0 at chunks of the filled rows with which a document begins, else 1; fp32 [batch, chunks]."""
    bounds: Tensor
    """Where documents begin in the rows one after the other, and the end; int32 [documents + 1]."""
    longest: int
    """Tokens of the longest document."""
    in_chunks: Mapping[int, Documents] = field(default_factory=dict)
    """The same in chunks of other lengths, by these."""

    @classmethod
    def of(
        cls,
        tokens: NDArray[np.int64],
        separator: int,
        chunk: int,
        device: torch.device,
        counts: NDArray[np.bool_] | None = None,
        others: Collection[int] = (),
    ) -> Documents:
        """Documents that begin with a row or with a separator, whose first token that then is.

        Args:
            tokens: [batch, sequence].
            separator: id that follows each document in the data.
            chunk: tokens of a chunk.
            device: where the model is.
            counts: which tokens have a target that counts, [batch, sequence]; None: all. Separators
                after the last of a row that has one fill the row up, and begin no documents: each
                would take a chunk.
            others: tokens of other chunks, by which they are had `in_chunks`, too.
        """
        batch, length = tokens.shape
        begins = tokens == separator
        if counts is not None:
            filling_up = ~np.logical_or.accumulate(counts[:, ::-1], axis=1)[:, ::-1]
            begins[:, 1:] &= ~(filling_up[:, 1:] & begins[:, :-1])
        begins[:, 0] = True
        time = np.arange(length)
        began = np.maximum.accumulate(np.where(begins, time, 0), axis=1)
        place = np.empty((batch, length), dtype=np.int64)
        firsts = []
        for row in range(batch):
            starts = np.flatnonzero(begins[row])
            chunks = -(-np.diff(starts, append=length) // chunk)
            first = np.concatenate([[0], chunks.cumsum()])
            place[row] = np.repeat(first[:-1] * chunk - starts, np.diff(starts, append=length))
            firsts.append(first)
        place += time
        count = max(first[-1] for first in firsts)
        source = np.zeros((batch, count * chunk), dtype=np.int64)
        filling = np.ones((batch, count * chunk), dtype=bool)
        carried = np.ones((batch, count), dtype=np.float32)
        for row, first in enumerate(firsts):
            source[row, place[row]], filling[row, place[row]] = time, False
            carried[row, first[:-1]] = 0
        bounds = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)

        def put(array: NDArray[Any]) -> Tensor:
            return to_device(array, device)

        made = cls(
            position=put(time - began),
            source=put(source),
            filling=put(filling),
            place=put(place),
            carried=put(carried),
            bounds=put(bounds),
            longest=int(np.diff(bounds).max()),
        )
        if not others:
            return made
        same = {length: cls.of(tokens, separator, length, device, counts) for length in others}
        return replace(made, in_chunks=same)

    def fill(self, x: Tensor) -> Tensor:
        """[batch, heads, sequence, ...] -> [batch, heads, filled, ...], zero where none stands."""
        return _Fill.apply(x, self)

    def take(self, x: Tensor) -> Tensor:
        """The tokens of [batch, heads, filled, ...], in their own order."""
        return _Take.apply(x, self)

    def attends(self) -> Tensor:
        """Which tokens each may attend to, bool [batch, 1, sequence, sequence]."""
        time = torch.arange(self.position.shape[1], device=self.position.device)
        began = (time - self.position)[:, :, None]
        return ((began <= time) & (time[:, None] >= time))[:, None]


class _Fill(torch.autograd.Function):
    """Each token has one place, so that the derivative only goes back, and nothing is added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return _fill(x, documents)

    @staticmethod
    def backward(ctx: Any, d_filled: Tensor) -> tuple[Tensor, None]:
        return _along(d_filled, ctx.documents.place), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filled: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return _along(filled, documents.place)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return _fill(d_x, ctx.documents), None


def _fill(x: Tensor, documents: Documents) -> Tensor:
    filling = documents.filling[:, None]
    return _along(x, documents.source).masked_fill_(
        filling if x.dim() == 3 else filling[..., None], 0
    )


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, heads, time, ...] at index [batch, time]."""
    index = index[:, None] if x.dim() == 3 else index[:, None, :, None]
    return x.take_along_dim(index, 2)

"""From token shards to batches: fixed-length samples, and reading them in shuffled order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from nlscale.data.mixture import Mixture
from nlscale.data.order import SampleOrder
from nlscale.data.shards import TokenShards
from nlscale.errors import UserError

_Taken = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of samples of a mixture, the place of the source and which of its samples: int64 [count] each."""


class Samples:
    """The samples of a split, in order: sample i is the tokens [i * S, i * S + S + 1).

    S is `sequence_length`. Neighbours share one token, which is the last target of one and the
    first input of the next, so every token but the first of the split is a target exactly once
    (up to a remainder of fewer than S tokens at the end).

    Raises:
        UserError: the split holds fewer than S + 1 tokens.
    """

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence length is {sequence_length}; it must be at least 1")
        if shards.tokens < sequence_length + 1:
            raise UserError(
                f"the {shards.split} split of {shards.directory} holds {shards.tokens:,} tokens, "
                f"one sample of sequence length {sequence_length:,} needs "
                f"{sequence_length + 1:,}; use more text or a shorter sequence length"
            )
        self.shards = shards
        self.sequence_length = sequence_length
        self._count = samples_in(shards.tokens, sequence_length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        """Sample i as int64 [S + 1]. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= i < self._count:
            raise IndexError(f"sample {i} of {self._count}")
        return self.shards.read(i * self.sequence_length, self.sequence_length + 1)

    def mask(self, i: int) -> NDArray[np.bool_] | None:
        """Which tokens of sample i count as targets: bool [S + 1]; None: all of all samples.

        The first is no target of this sample, whatever is said of it.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"sample {i} of {self._count}")
        return self.shards.read_mask(i * self.sequence_length, self.sequence_length + 1)

    def first(self, count: int) -> Samples:
        """The first samples alone, as many as there are up to `count`, at least 1."""
        few = copy(self)
        few._count = min(self._count, count)
        return few


def samples_in(tokens: int, sequence_length: int) -> int:
    """Samples of a split of so many tokens, in an epoch."""
    return (tokens - 1) // sequence_length


class BatchReader:
    """Reads samples in the shuffled order of `seed`, by global sample number.

    It has no position: a caller that knows its step knows which numbers to ask for
    (step * global batch size + place in the batch), on any rank and after any restart.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.order = SampleOrder(len(samples), seed)
        self.separator = samples.shards.separator

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Global sample numbers first .. first + count - 1: int64 [count, S + 1]."""
        batch = np.empty((count, self.samples.sequence_length + 1), dtype=np.int64)
        for row, sample in enumerate(self.order.take(first, count)):
            batch[row] = self.samples[int(sample)]
        return batch

    def expect(self, numbers: Iterable[tuple[int, int]]) -> None:
        """Global sample numbers that will be read soon, (first, count), the first first.

        Shards that lie on another service are then fetched meanwhile.
        """
        samples, length = self.samples, self.samples.sequence_length
        taken = (sample for first, count in numbers for sample in self.order.take(first, count))
        samples.shards.expect((int(sample) * length, length + 1) for sample in taken)

    def masks(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """Which tokens of the same count as targets: bool [count, S + 1]; None: all of all."""
        if not self.samples.shards.masked:
            return None
        masks = np.empty((count, self.samples.sequence_length + 1), dtype=np.bool_)
        for row, sample in enumerate(self.order.take(first, count)):
            masks[row] = self.samples.mask(int(sample))
        return masks

    def sources(self, first: int, count: int) -> tuple[NDArray[np.int64], int] | None:
        """Of which source each is, as `MixtureReader` says it; None: there is one alone."""
        return None


class MixtureReader:
    """Reads samples of several sources in the order of a mixture, as `BatchReader` those of one.

    Args:
        sources: samples of one length and one tokenizer, in the order of those of `order`; of one
            that is not read any more, None.
        order: which of them, and which of its samples, a global sample number stands for.
    """

    def __init__(self, sources: Sequence[Samples | None], order: Mixture) -> None:
        self._sources, self.order = sources, order
        some = [source for source in sources if source is not None]
        self._length = some[0].sequence_length
        self._fetches = any(source.shards.folder.fetches for source in some)
        self._latest: tuple[tuple[int, int], _Taken] | None = None
        self._masked = any(source.shards.masked for source in some)
        self.separator = some[0].shards.separator

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Global sample numbers first .. first + count - 1: int64 [count, S + 1]."""
        batch = np.empty((count, self._length + 1), dtype=np.int64)
        for row, (source, sample) in enumerate(self._taken(first, count)):
            batch[row] = source[sample]
        return batch

    def masks(self, first: int, count: int) -> NDArray[np.bool_] | None:
        """Which tokens of the same count as targets: bool [count, S + 1]; None: all of all."""
        if not self._masked:
            return None
        masks = np.ones((count, self._length + 1), dtype=np.bool_)
        for row, (source, sample) in enumerate(self._taken(first, count)):
            mask = source.mask(sample)
            if mask is not None:
                masks[row] = mask
        return masks

    def expect(self, numbers: Iterable[tuple[int, int]]) -> None:
        """Global sample numbers that will be read soon, as `BatchReader.expect` takes them."""
        if not self._fetches:
            return
        soon: dict[int, list[tuple[int, int]]] = {}
        for first, count in _adjoined(numbers):
            for place, sample in zip(*self.order.take(first, count), strict=True):
                start = int(sample) * self._length
                soon.setdefault(int(place), []).append((start, self._length + 1))
        for place, ranges in soon.items():
            source = self._sources[place]
            assert source is not None, f"source {place} is read no more"
            source.shards.expect(ranges)

    def sources(self, first: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Of which source each of the same is, its place: int64 [count]; and how many there are."""
        return self._in_order(first, count)[0], len(self._sources)

    def _taken(self, first: int, count: int) -> list[tuple[Samples, int]]:
        taken = []
        for place, sample in zip(*self._in_order(first, count), strict=True):
            source = self._sources[place]
            assert source is not None, f"source {place} is read no more"
            taken.append((source, int(sample)))
        return taken

    def _in_order(self, first: int, count: int) -> _Taken:
        """Source and sample of each, kept for the others that are asked of the same batch."""
        latest = self._latest
        if latest is None or latest[0] != (first, count):
            latest = self._latest = (first, count), self.order.take(first, count)
        return latest[1]


def _adjoined(numbers: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges, (first, count), of which those that follow on each other are one."""
    begin = end = 0
    for first, count in numbers:
        if first != end:
            if end > begin:
                yield begin, end - begin
            begin = first
        end = first + count
    if end > begin:
        yield begin, end - begin

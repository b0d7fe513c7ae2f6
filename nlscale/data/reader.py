"""From token shards to batches: fixed-length samples, and reading them in shuffled order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from nlscale.data.order import SampleOrder
from nlscale.data.shards import TokenShards
from nlscale.errors import UserError


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
        self._count = (shards.tokens - 1) // sequence_length

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


class BatchReader:
    """Reads samples in the shuffled order of `seed`, by global sample number.

    It has no position: a caller that knows its step knows which numbers to ask for
    (step * global batch size + place in the batch), on any rank and after any restart.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.order = SampleOrder(len(samples), seed)

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

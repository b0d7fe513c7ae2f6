"""The order of the samples: a pure function of the seed and the global sample number.

No list is stored and no generator is advanced, so resuming at any step, on any number of ranks,
reads exactly what an uninterrupted run would have read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 step: a bijection of 64-bit integers whose output bits all look random."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of_cut(seed: int, cut: int) -> int:
    """The seed of the order of a cut of the data, in which sequences have another length.

    Args:
        seed: of the run, which the first cut, 0, has.
        cut: its number.
    """
    if cut == 0:
        return seed
    mixed = _mix(np.full(1, seed & _MASK, dtype=np.uint64)) + np.uint64(cut) * _GOLDEN
    return int(_mix(mixed)[0])


class SampleOrder:
    """A shuffled order over `samples` samples, without replacement within an epoch.

    Global sample number g belongs to epoch g // samples; within an epoch the map from number to
    sample is a permutation keyed by (seed, epoch): a Feistel network on the smallest even number
    of bits that covers `samples`, walked until it lands inside the range.

    Raises:
        ValueError: unless 1 <= samples < 2**62.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if not 1 <= samples < 1 << 62:
            raise ValueError(f"samples is {samples}; it must be at least 1 and below 2**62")
        self.samples = samples
        self.seed = seed
        self._half = np.uint64(max(1, ((samples - 1).bit_length() + 1) // 2))

    def __getitem__(self, number: int) -> int:
        """The sample, in [0, samples), that global sample number `number` >= 0 stands for."""
        return int(self.take(number, 1)[0])

    def take(self, first: int, count: int) -> NDArray[np.int64]:
        """The samples for global sample numbers first .. first + count - 1: int64 [count].

        Raises:
            ValueError: a negative `first` or `count`.
        """
        if first < 0 or count < 0:
            raise ValueError(f"first is {first} and count {count}; neither may be negative")
        numbers = np.uint64(first) + np.arange(count, dtype=np.uint64)
        epoch, position = np.divmod(numbers, np.uint64(self.samples))
        # The seed is hashed first, or (seed, epoch + 1) and (seed + 1, epoch) could share a key.
        seed = np.full(1, self.seed & _MASK, dtype=np.uint64)
        key = _mix(_mix(seed) ^ epoch)
        result = self._permute(position, key)
        # The network permutes a range up to four times as wide. Following the cycle until it
        # comes back below `samples` restricts it to a permutation of the samples themselves.
        outside = np.flatnonzero(result >= self.samples)
        while outside.size:
            result[outside] = self._permute(result[outside], key[outside])
            outside = outside[result[outside] >= self.samples]
        return result.astype(np.int64)

    def _permute(self, x: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = x >> self._half, x & mask
        for _ in range(_ROUNDS):
            key = _mix(key)
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half) | right

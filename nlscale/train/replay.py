"""Samples of before that are read again, in the places of a share of the new ones.

A buffer holds numbers of samples, not the samples. Which places of a step it fills, and with which
of them, follows from the seed and the number of the place alone, so that every layout of ranks
reads the same, and a run that resumes goes on as it would have. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUFFER = "the buffer"
"""Its place in `Trainer.noted`, among the names of hooks."""
_PLACE, _CHOICE, _RANK = 1, 2, 3
"""What a hash is for."""


class Replay:
    """The buffer of a run.

    Args:
        noted: where it is kept, which checkpoints hold (`Trainer.noted`).
        seed: of the run.
    """

    def __init__(self, noted: dict[str, Any], seed: int) -> None:
        self._noted, self._seed = noted, seed
        self.version = 0
        """Another one each time that it is filled."""

    @property
    def numbers(self) -> list[int]:
        """Those of the samples in it."""
        return list(self._noted.get("numbers", []))

    def fill(self, numbers: Iterable[int], share: float) -> None:
        """Read these samples, from the next step on, in so many of the places of a step.

        Args:
            numbers: global sample numbers, all of samples that the run has come to.
            share: of all places, on the average, 0 to 1.
        """
        self._noted.update(numbers=[int(number) for number in numbers], share=float(share))
        self.version += 1

    def instead_of(self, numbers: Sequence[int]) -> Sequence[int]:
        """What is read in the places of new samples: they themselves, or one of the buffer."""
        held, share = self._noted.get("numbers"), self._noted.get("share", 0.0)
        if not held:
            return numbers
        new = np.asarray(numbers)
        again = uniform(new, self._seed, _PLACE) < share
        chosen = np.asarray(held)[(uniform(new, self._seed, _CHOICE) * len(held)).astype(np.int64)]
        return [int(number) for number in np.where(again, chosen, new)]


def uniform(numbers: NDArray[np.int64], seed: int, what_for: int) -> NDArray[np.float64]:
    """A number from 0 to below 1 for each, by hashing it (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64)
        for word in (seed, what_for):
            x = _mixed(x + np.uint64((word * 0x9E3779B97F4A7C15 + 1) % 2**64))
    return (x >> np.uint64(11)) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def reservoir(before: Sequence[int], new: Iterable[int], size: int, seed: int) -> list[int]:
    """So many of all samples so far, each as likely as any other (Vitter 1985, by ranks).

    Those whose ranks by a hash are the lowest: of what was kept before and what has come since,
    whatever the pieces in which it came.
    """
    all_of_them = np.unique(np.fromiter([*before, *new], np.int64))
    ranks = uniform(all_of_them, seed, _RANK)
    return sorted(int(n) for n in all_of_them[np.argsort(ranks, kind="stable")[:size]])

"""Recall in the manner of MAD (Poli et al., "Mechanistic design and scaling", 2024).

Keys have values for one example (`mad-memorise`: for ever), and pairs follow each other; from the
second time a key stands there its value counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task, numbered


@dataclass(frozen=True)
class _Pairs(Task):
    """Ids: V/2 - 1 keys, V/2 values (rounded up), and after them the padding."""

    family = "mad"

    vocabulary: int = within(16, least=4, most=1 << 16)
    length: int = within(128, least=4, most=1 << 20)

    @property
    def _keys(self) -> int:
        return self.vocabulary // 2 - 1

    @property
    def words(self) -> Sequence[str]:
        return [*numbered("k", self._keys), *numbered("v", len(self.answers))]

    @property
    def answers(self) -> range:
        return range(self._keys, self.vocabulary - 1)

    def longer(self, factor: int) -> Task:
        return replace(self, length=factor * self.length)


@dataclass(frozen=True)
class Recall(_Pairs):
    """Keys and values of one token."""

    name = "mad-recall"
    about = "pairs of keys and values, over and over: the values of keys seen before"

    def check(self) -> None:
        if self.length < 2 * (self._keys + 1):
            raise self.wrong(
                f"{self._keys} keys may all come once before one comes again; set length to "
                f"{2 * self._keys + 2} or more"
            )

    def draw(self, rng: Generator) -> Example:
        pairs, again = self._pairs_of(rng, self.length // 2)
        return self.padded(pairs.reshape(-1), 2 * np.flatnonzero(again) + 1)

    def _pairs_of(self, rng: Generator, count: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Pairs, int64 [count, 2], and whether the key of each was there before, bool [count]."""
        value_of = rng.choice(self.answers, self._keys)
        keys = rng.integers(0, self._keys, count)
        again = np.ones(count, dtype=bool)
        again[np.unique(keys, return_index=True)[1]] = False
        return np.stack([keys, value_of[keys]], axis=1), again

    def solve(self, ids: Ids) -> int:
        before = np.flatnonzero(ids[:-1] == ids[-1])
        return int(ids[before[-1] + 1])


@dataclass(frozen=True)
class NoisyRecall(Recall):
    """With tokens between the pairs that mean nothing; their ids follow those of the values."""

    name = "mad-noisy-recall"
    about = "as mad-recall, with noise between the pairs"

    noises: int = within(16, least=1, most=1 << 16)
    """Ids of the noise."""
    share: float = within(0.2, least=0, most=0.9)
    """Of the tokens that are noise."""

    def check(self) -> None:
        if self._pairs <= self._keys:
            raise self.wrong(
                f"it has {self._keys} keys, all of which may come once before one comes again, and "
                f"room for {self._pairs} pairs; raise length or lower share"
            )

    @property
    def _pairs(self) -> int:
        return (self.length - int(self.share * self.length)) // 2

    @property
    def words(self) -> Sequence[str]:
        return [*super().words, *numbered("n", self.noises)]

    def draw(self, rng: Generator) -> Example:
        pairs, again = self._pairs_of(rng, self._pairs)
        # What follows each other: pairs, and single tokens of noise.
        pieces = self.length - len(pairs)
        sizes = np.ones(pieces, dtype=np.int64)
        sizes[rng.choice(pieces, len(pairs), replace=False)] = 2
        keys = (np.cumsum(sizes) - sizes)[sizes == 2]
        ids = self.vocabulary - 1 + rng.integers(0, self.noises, self.length)
        ids[keys], ids[keys + 1] = pairs[:, 0], pairs[:, 1]
        return self.padded(ids, keys[again] + 1)


@dataclass(frozen=True)
class FuzzyRecall(_Pairs):
    """Keys and values of one to `motif` tokens."""

    name = "mad-fuzzy-recall"
    about = "as mad-recall, with keys and values of several tokens"

    motif: int = within(3, least=1, most=64)
    """The most tokens of a key, and of a value."""

    def check(self) -> None:
        needed = 2 * self.motif * (self._keys + 1)
        if self.length < needed:
            raise self.wrong(
                f"{self._keys} keys may all come once before one comes again; set length to "
                f"{needed} or more"
            )

    def draw(self, rng: Generator) -> Example:
        keys: dict[tuple[int, ...], list[int]] = {}
        while len(keys) < self._keys:
            key = tuple(rng.integers(0, self._keys, rng.integers(1, self.motif + 1)).tolist())
            keys.setdefault(key, rng.choice(self.answers, rng.integers(1, self.motif + 1)).tolist())
        known, ids, counted = list(keys), list[int](), list[int]()
        seen: set[int] = set()
        while True:
            number = int(rng.integers(len(known)))
            key, value = known[number], keys[known[number]]
            first = len(ids) + len(key)
            if first + len(value) > self.length:
                return self.padded(ids, counted)
            ids += [*key, *value]
            if number in seen:
                counted += range(first, len(ids))
            seen.add(number)

    def solve(self, ids: Ids) -> int:
        # A key is a run of keys' tokens, and its value the run of values' tokens behind it.
        pairs: list[tuple[list[int], list[int]]] = [([], [])]
        for token in ids.tolist():
            is_key = token < self._keys
            if is_key and pairs[-1][1]:
                pairs.append(([], []))
            pairs[-1][0 if is_key else 1].append(token)
        asked, begun = pairs.pop()
        return next(value for key, value in reversed(pairs) if key == asked)[len(begun)]


@dataclass(frozen=True)
class Memorise(_Pairs):
    """What every key's value is never changes: it has to be learned, and is in no example."""

    name = "mad-memorise"
    about = "keys whose values are the same in all examples, and are to be learned"

    vocabulary: int = within(256, least=4, most=1 << 16)
    length: int = within(32, least=4, most=1 << 20)
    table: int = within(0, least=0)
    """Which values the keys have; it is not what `--seed` is, which draws the examples."""

    def check(self) -> None:
        if self.length // 2 > self._keys:
            raise self.wrong(
                f"{self.length // 2} pairs need as many keys that differ, and it has {self._keys}; "
                f"set vocabulary to {2 * (self.length // 2) + 2} or more, or length to "
                f"{2 * self._keys} or less"
            )

    def draw(self, rng: Generator) -> Example:
        keys = rng.choice(self._keys, self.length // 2, replace=False)
        values = [self._value_of[key] for key in keys.tolist()]
        ids = np.stack([keys, values], axis=1).reshape(-1)
        return self.padded(ids, range(1, len(ids), 2))

    def solve(self, ids: Ids) -> int:
        return self._value_of[int(ids[-1])]

    @property
    def _value_of(self) -> tuple[int, ...]:
        return _table(self.table, self._keys, self.answers)


@cache
def _table(seed: int, keys: int, answers: range) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).choice(answers, keys).tolist())

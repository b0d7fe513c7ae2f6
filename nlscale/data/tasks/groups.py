"""What a word multiplies or adds up to: one state is to be kept, and every symbol moves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nlscale.config.fields import within
from nlscale.data.tasks.words import Words


@dataclass(frozen=True)
class Parity(Words):
    """Whether a word of zeros and ones has an odd number of ones."""

    name = "parity"
    about = "whether a word of 0 and 1 has an odd number of ones"

    alphabet = ("0", "1")
    states = ("even", "odd")

    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        word = rng.integers(0, 2, length)
        return word.tolist(), int(word.sum()) % 2

    def read(self, word: list[int]) -> int:
        odd = 0
        for symbol in word:
            odd ^= symbol
        return odd


@dataclass(frozen=True)
class Modular(Words):
    """The sum of the digits of a word, modulo a number."""

    name = "modular"
    about = "the sum of a word's digits, modulo `modulus`"

    modulus: int = within(3, least=2, most=1000)

    @property
    def alphabet(self) -> Sequence[str]:
        return [str(digit) for digit in range(self.modulus)]

    @property
    def states(self) -> Sequence[str]:
        return self.alphabet

    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        word = rng.integers(0, self.modulus, length)
        return word.tolist(), int(word.sum()) % self.modulus

    def read(self, word: list[int]) -> int:
        state = 0
        for symbol in word:
            state = (state + symbol) % self.modulus
        return state


@dataclass(frozen=True)
class _Permutations(Words):
    """The product of a word of permutations of `moved` things.

    A permutation p is written as p(0) p(1) ...; the word p q stands for x -> p(q(x)).
    """

    moved: ClassVar[int]

    @property
    def alphabet(self) -> Sequence[str]:
        return _written(self.moved)

    @property
    def states(self) -> Sequence[str]:
        return self.alphabet

    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        group = _products(self.moved)
        word = rng.integers(0, len(group), length).tolist()
        state = 0  # the identity
        for symbol in word:
            state = int(group[state, symbol])
        return word, state

    def read(self, word: list[int]) -> int:
        group = _group(self.moved)
        things = tuple(range(self.moved))
        for symbol in reversed(word):  # the last is applied first
            things = tuple(group[symbol][thing] for thing in things)
        return group.index(things)


@dataclass(frozen=True)
class S3(_Permutations):
    """The smallest group whose order of factors matters: 6 permutations."""

    name = "s3"
    about = "the product of a word of permutations of 3 things"
    moved = 3


@dataclass(frozen=True)
class S5(_Permutations):
    """The smallest whose word problem no circuit of constant depth solves: 120 permutations."""

    name = "s5"
    about = "the product of a word of permutations of 5 things"
    moved = 5


@cache
def _group(moved: int) -> list[tuple[int, ...]]:
    """All permutations in order; number 0 is the identity."""
    return list(permutations(range(moved)))


@cache
def _written(moved: int) -> list[str]:
    """Their symbols."""
    return ["".join(map(str, p)) for p in _group(moved)]


@cache
def _products(moved: int) -> NDArray[np.int64]:
    """Which permutation p after q is, int64 [p, q]."""
    group = _group(moved)
    number = {p: i for i, p in enumerate(group)}
    return np.array([[number[tuple(p[x] for x in q)] for q in group] for p in group])

"""Whether a word belongs to a formal language.

Half of the words do. The others are spoiled ones, of the same length where the language allows it:
blocks of unequal sizes, a symbol changed, two symbols exchanged; so neither a length nor a count of
symbols alone tells.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from nlscale.data.tasks.words import Words


@dataclass(frozen=True)
class _Decision(Words):
    """Yes or no, about words of single letters."""

    alphabet: ClassVar[str]
    states = ("no", "yes")

    @abstractmethod
    def accepts(self, word: str) -> bool:
        """Whether it belongs, found by reading it."""

    def read(self, word: list[int]) -> int:
        return int(self.accepts("".join(self.alphabet[symbol] for symbol in word)))


@dataclass(frozen=True)
class EvenAs(_Decision):
    """(aa)*: there is one letter, and so the length alone decides."""

    name = "aa"
    about = "whether a word of a has an even length: (aa)*"
    alphabet = "a"

    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        return [0] * length, int(length % 2 == 0)

    def accepts(self, word: str) -> bool:
        even = True
        for _ in word:
            even = not even
        return even


@dataclass(frozen=True)
class _Language(_Decision):
    """A language with words that are nearly in it."""

    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        member, belongs = self.member(rng, length), int(rng.integers(2))
        return (member if belongs else self.spoiled(rng, member, most)), belongs

    @abstractmethod
    def member(self, rng: Generator, length: int) -> list[int]:
        """A word of the language, `length` a multiple of `unit`."""

    @abstractmethod
    def spoiled(self, rng: Generator, member: list[int], most: int) -> list[int]:
        """A word outside it, much like one inside."""


@dataclass(frozen=True)
class Abab(_Language):
    """(abab)*: a cycle of four states; spoiled by a change, or by one to three symbols more."""

    name = "abab"
    about = "whether a word is abab repeated: (abab)*"
    alphabet = "ab"
    unit = 4

    def member(self, rng: Generator, length: int) -> list[int]:
        return [0, 1] * (length // 2)

    def spoiled(self, rng: Generator, member: list[int], most: int) -> list[int]:
        more = int(rng.integers(1, 4))
        if len(member) + more <= most and rng.integers(2):
            return [*member, *([0, 1] * 2)[:more]]
        return _changed(rng, member, len(self.alphabet))

    def accepts(self, word: str) -> bool:
        state = 0
        for letter in word:
            if letter != "ab"[state % 2]:
                return False
            state = (state + 1) % 4
        return state == 0


@dataclass(frozen=True)
class _Blocks(_Language):
    """As many a as b (as c ...), in this order."""

    def member(self, rng: Generator, length: int) -> list[int]:
        each = length // len(self.alphabet)
        return [letter for letter in range(len(self.alphabet)) for _ in range(each)]

    def spoiled(self, rng: Generator, member: list[int], most: int) -> list[int]:
        ways: list[Callable[[Generator, list[int], int], list[int]]]
        ways = [_changed, _exchanged, _unequal]
        return ways[int(rng.integers(len(ways)))](rng, member, len(self.alphabet))

    def accepts(self, word: str) -> bool:
        count = word.count(self.alphabet[0])
        return count > 0 and word == "".join(letter * count for letter in self.alphabet)


@dataclass(frozen=True)
class Anbn(_Blocks):
    """a^n b^n, n at least 1: one counter."""

    name = "anbn"
    about = "whether a word is n times a, then n times b"
    alphabet = "ab"
    unit = 2


@dataclass(frozen=True)
class Anbncn(_Blocks):
    """a^n b^n c^n, n at least 1: two counters."""

    name = "anbncn"
    about = "whether a word is n times a, then n times b, then n times c"
    alphabet = "abc"
    unit = 3


@dataclass(frozen=True)
class Shuffle2(_Language):
    """Two balanced words of brackets, (...) and [...], mixed: two counters at once."""

    name = "shuffle2"
    about = "whether ( ) and [ ] are balanced, each kind by itself"
    alphabet = "()[]"
    unit = 2

    def member(self, rng: Generator, length: int) -> list[int]:
        word: list[int] = []
        depth = [0, 0]
        for left in range(length, 0, -1):
            kind = int(rng.integers(2))
            if sum(depth) == left:  # all that is open has to be closed now
                kind = kind if depth[kind] else 1 - kind
                opens = False
            else:
                opens = depth[kind] == 0 or bool(rng.integers(2))
            depth[kind] += 1 if opens else -1
            word.append(2 * kind + (not opens))
        return word

    def spoiled(self, rng: Generator, member: list[int], most: int) -> list[int]:
        if not rng.integers(4):
            return _changed(rng, member, len(self.alphabet))
        # One bracket has changed places with its like: counts are right, and so may the end be.
        pairs = [self._crossed(member, kind) for kind in (0, 1)]
        crossed = [word for word in pairs if word is not None]
        return crossed[int(rng.integers(len(crossed)))]

    def _crossed(self, member: list[int], kind: int) -> list[int] | None:
        """Its first bracket of a kind, which opens, and the next that closes, exchanged."""
        opening, closing = 2 * kind, 2 * kind + 1
        if opening not in member:
            return None
        first = member.index(opening)
        second = member.index(closing, first)
        word = list(member)
        word[first], word[second] = closing, opening
        return word

    def accepts(self, word: str) -> bool:
        for opening, closing in ("()", "[]"):
            depth = 0
            for letter in word:
                depth += (letter == opening) - (letter == closing)
                if depth < 0:
                    return False
            if depth:
                return False
        return True


def _changed(rng: Generator, word: list[int], letters: int) -> list[int]:
    """One symbol is another."""
    place = int(rng.integers(len(word)))
    other = (word[place] + int(rng.integers(1, letters))) % letters
    return [*word[:place], other, *word[place + 1 :]]


def _exchanged(rng: Generator, word: list[int], letters: int) -> list[int]:
    """Two symbols that differ have changed places; the counts are right, the order is not."""
    first, second = rng.choice(letters, 2, replace=False)
    places = [int(rng.choice(np.flatnonzero(np.array(word) == x))) for x in (first, second)]
    spoiled = list(word)
    spoiled[places[0]], spoiled[places[1]] = spoiled[places[1]], spoiled[places[0]]
    return spoiled


def _unequal(rng: Generator, word: list[int], letters: int) -> list[int]:
    """One block is longer and another shorter by as much; the order is right."""
    each = len(word) // letters
    sizes = [each] * letters
    longer, shorter = rng.choice(letters, 2, replace=False)
    by = int(rng.integers(1, min(each, 3) + 1))  # near misses
    sizes[longer] += by
    sizes[shorter] -= by
    return [letter for letter, size in enumerate(sizes) for _ in range(size)]

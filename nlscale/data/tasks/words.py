"""Tasks about words: words of random lengths, each with one question about the whole of it.

    0 1 1 ? =0  1 ? =1  0 0 1 ? =1  _ _

A language model reads its targets back as inputs. An answer after every symbol would therefore
hand it the state that it is to keep, and what is left to learn would look back two tokens. So a
word has one answer, at its end, and the next word owes nothing to it. Short words among the long
ones are what makes it learnable.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task


@dataclass(frozen=True)
class Words(Task):
    """As many words as fit, each followed by `?` and its answer; those alone count.

    Ids: the alphabet, `?`, the answers, the padding.
    """

    family = "automata"
    unit: ClassVar[int] = 1
    """Of which the lengths of words are multiples, so that a length tells nothing."""

    longest: int = within(16, least=1, most=1 << 18)
    shortest: int = within(1, least=1, most=1 << 18)
    length: int = within(64, least=3, most=1 << 20)

    def check(self) -> None:
        if self.shortest > self.longest:
            raise self.wrong("shortest is above longest; lower it")
        if self.longest // self.unit * self.unit < self.shortest:
            raise self.wrong(
                f"no word has {self.shortest} to {self.longest} symbols: lengths are multiples of "
                f"{self.unit}; set longest to {-(-self.shortest // self.unit) * self.unit}"
            )
        if self.length < self.longest + 2:
            raise self.wrong(
                f"a word of {self.longest} symbols with its question takes {self.longest + 2} "
                f"tokens; set length to {self.longest + 2} or more"
            )

    @property
    @abstractmethod
    def alphabet(self) -> Sequence[str]:
        """Symbols that words consist of; their ids begin at 0."""

    @property
    @abstractmethod
    def states(self) -> Sequence[str]:
        """Symbols of the answers, by their number."""

    @abstractmethod
    def word(self, rng: Generator, length: int, most: int) -> tuple[Sequence[int], int]:
        """A word and the number of its answer.

        Args:
            length: of it, in symbols, a multiple of `unit`.
            most: symbols that it may have instead, where its length is what is wrong with it.
        """

    @abstractmethod
    def read(self, word: list[int]) -> int:
        """The number of a word's answer, found by reading it."""

    @property
    def words(self) -> Sequence[str]:
        return [*self.alphabet, "?", *(f"={state}" for state in self.states)]

    @property
    def answers(self) -> range:
        first = len(self.alphabet) + 1
        return range(first, first + len(self.states))

    def draw(self, rng: Generator) -> Example:
        ids: list[int] = []
        counted: list[int] = []
        question, answers = len(self.alphabet), self.answers
        while True:
            room = min(self.longest, self.length - len(ids) - 2)
            low, high = -(-self.shortest // self.unit), room // self.unit
            if low > high:
                return self.padded(ids, counted)
            length = self.unit * int(rng.integers(low, high + 1))
            word, answer = self.word(rng, length, room)
            ids += [*word, question, answers[answer]]
            counted.append(len(ids) - 1)

    def solve(self, ids: Ids) -> int:
        symbols, answers = ids[:-1].tolist(), self.answers  # without the question
        begins = len(symbols)
        while begins and symbols[begins - 1] not in answers:
            begins -= 1
        return answers[self.read(symbols[begins:])]

    def longer(self, factor: int) -> Task:
        """With words longer than half of the longest that they can then have."""
        longest = factor * self.longest
        return replace(
            self, shortest=longest // 2 + 1, longest=longest, length=factor * self.length
        )

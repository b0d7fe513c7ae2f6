"""Copying in the manner of MAD (Poli et al., "Mechanistic design and scaling", 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task, numbered


@dataclass(frozen=True)
class _Copy(Task):
    """Symbols, a mark, the symbols again; the second time counts."""

    family = "mad"
    beside: ClassVar[tuple[str, ...]]
    """The ids between those of the symbols and the padding; the last is the mark."""

    vocabulary: int = within(16, least=4, most=1 << 16)
    length: int = within(32, least=3, most=1 << 20)

    @property
    def words(self) -> Sequence[str]:
        return [*numbered("t", len(self.answers)), *self.beside]

    @property
    def answers(self) -> range:
        return range(self.vocabulary - 1 - len(self.beside))

    def solve(self, ids: Ids) -> int:
        mark = len(self.words) - 1
        at = int(np.flatnonzero(ids == mark)[0])
        before = ids[:at]
        return int(before[before < len(self.answers)][len(ids) - at - 1])


@dataclass(frozen=True)
class SelectiveCopy(_Copy):
    """The symbols stand at random places among blanks."""

    name = "mad-selective-copy"
    about = "symbols among blanks: the symbols alone, in their order"
    beside = (".", ">")

    length: int = within(256, least=3, most=1 << 20)
    tokens: int = within(16, least=1, most=1 << 16)
    """Symbols to copy."""

    def check(self) -> None:
        if self.length < 2 * self.tokens + 1:
            raise self.wrong(
                f"{self.tokens} symbols, the mark and the symbols again take {2 * self.tokens + 1} "
                f"tokens; set length to that or more"
            )

    def draw(self, rng: Generator) -> Example:
        body = self.length - self.tokens - 1
        blank, mark = len(self.words) - 2, len(self.words) - 1
        ids = np.full(self.length, blank, dtype=np.int64)
        symbols = rng.integers(0, len(self.answers), self.tokens)
        ids[np.sort(rng.choice(body, self.tokens, replace=False))] = symbols
        ids[body] = mark
        ids[body + 1 :] = symbols
        return self.padded(ids, range(body + 1, self.length))

    def longer(self, factor: int) -> Task:
        """With more blanks."""
        return replace(self, length=factor * self.length)


@dataclass(frozen=True)
class Compress(_Copy):
    """No blanks: at the mark a state of fixed size has to hold all that came before it.

    MAD has a decoder of its own make the symbols out of what the model gives at the mark; here the
    model itself goes on.
    """

    name = "mad-compress"
    about = "random symbols, a mark, and the same symbols again"
    beside = ("|",)

    def draw(self, rng: Generator) -> Example:
        count = (self.length - 1) // 2
        symbols = rng.integers(0, len(self.answers), count).tolist()
        ids = [*symbols, len(self.words) - 1, *symbols]
        return self.padded(ids, range(count + 1, len(ids)))

    def longer(self, factor: int) -> Task:
        """With more symbols."""
        return replace(self, length=factor * self.length)

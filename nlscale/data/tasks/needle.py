"""A passkey in noise, token by token (in the manner of RULER, Hsieh et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task, numbered


@dataclass(frozen=True)
class Needle(Task):
    """Noise that holds `! key digits` at random depths, and at its end `? key digits`.

    Ids: the digits, the keys, the noise, `!`, `?`, the padding. The digits at the end count.
    """

    name = "needle"
    family = "needle"
    about = "a key with digits somewhere in noise, and at the end the key: its digits"

    length: int = within(256, least=6, most=1 << 22)
    needles: int = within(1, least=1, most=1 << 16)
    """Keys with digits in the noise, of which one is asked for."""
    digits: int = within(4, least=1, most=1 << 10)
    keys: int = within(16, least=1, most=1 << 16)
    noises: int = within(32, least=1, most=1 << 16)
    """Ids of the noise."""

    def check(self) -> None:
        needed = (self.needles + 1) * self._size
        if self.length < needed:
            raise self.wrong(
                f"{self.needles} needles and the question take {needed} tokens; set length to that "
                f"or more"
            )
        if self.needles > self.keys:
            raise self.wrong(
                f"{self.needles} needles need as many keys; set keys to {self.needles}"
            )

    @property
    def _size(self) -> int:
        return 2 + self.digits

    @property
    def words(self) -> Sequence[str]:
        digits = [str(digit) for digit in self.answers]
        return [*digits, *numbered("k", self.keys), *numbered("n", self.noises), "!", "?"]

    @property
    def answers(self) -> range:
        return range(10)

    def draw(self, rng: Generator) -> Example:
        body = self.length - self._size
        mark, question = len(self.words) - 2, len(self.words) - 1
        ids = 10 + self.keys + rng.integers(0, self.noises, self.length)
        free = body - self.needles * self._size
        gaps = np.sort(rng.integers(0, free + 1, self.needles))  # noise before each needle
        starts = gaps + self._size * np.arange(self.needles)
        keys = 10 + rng.choice(self.keys, self.needles, replace=False)
        digits = rng.integers(0, 10, (self.needles, self.digits))
        for start, key, value in zip(starts, keys, digits, strict=True):
            ids[start : start + self._size] = [mark, key, *value]
        asked = int(rng.integers(self.needles))
        ids[body:] = [question, keys[asked], *digits[asked]]
        return self.padded(ids, range(body + 2, self.length))

    def solve(self, ids: Ids) -> int:
        mark, question = len(self.words) - 2, len(self.words) - 1
        at = int(np.flatnonzero(ids == question)[-1])
        needles = np.flatnonzero((ids[:-1] == mark) & (ids[1:] == ids[at + 1]))
        return int(ids[needles[0] + 2 + len(ids) - (at + 2)])

    def longer(self, factor: int) -> Task:
        """With more noise."""
        return replace(self, length=factor * self.length)

"""Multi-query associative recall (Arora et al., "Zoology", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task, numbered

_POWER = 0.01
"""Slot i of the queries, counted from 1, is taken with a weight of i to the power of this less 1:
most keys are asked for soon, some late."""


@dataclass(frozen=True)
class Mqar(Task):
    """Pairs of key and value, then each key again at a random place, whose value is asked for."""

    name = "mqar"
    family = "recall"
    about = "keys with values, then each key again: its value"

    vocabulary: int = within(64, least=4, most=1 << 20)
    """Ids: V/2 - 1 keys, V/2 values (rounded up), and the padding."""
    length: int = within(32, least=4, most=1 << 20)
    pairs: int = within(4, least=1, most=1 << 18)
    forgetting: bool = False
    """Half of the pairs (rounded down) give a key that was there before another value; the last
    one counts."""

    def check(self) -> None:
        if self._asked > self._keys:
            raise self.wrong(
                f"it has {self._keys} keys for {self._asked} that differ; set vocabulary to "
                f"{2 * self._asked + 2} or more"
            )
        if self.pairs > len(self.answers):
            raise self.wrong(
                f"it has {len(self.answers)} values for {self.pairs} pairs, no two of which have "
                f"the same; set vocabulary to {2 * self.pairs + 2} or more"
            )
        needed = 2 * (self.pairs + self._asked)
        if self.length < needed:
            raise self.wrong(
                f"{self.pairs} pairs and their {self._asked} queries take {needed} tokens; set "
                f"length to {needed} or more"
            )

    @property
    def _keys(self) -> int:
        return self.vocabulary // 2 - 1

    @property
    def _asked(self) -> int:
        """Keys that differ, each of which is asked for once."""
        return (self.pairs + 1) // 2 if self.forgetting else self.pairs

    @property
    def words(self) -> Sequence[str]:
        return [*numbered("k", self._keys), *numbered("v", len(self.answers))]

    @property
    def answers(self) -> range:
        return range(self._keys, self.vocabulary - 1)

    def draw(self, rng: Generator) -> Example:
        keys = rng.choice(self._keys, self._asked, replace=False)
        if self.forgetting:  # every key at least once, some of them twice
            twice = rng.choice(keys, self.pairs - self._asked, replace=False)
            given = rng.permutation(np.concatenate([keys, twice]))
        else:
            given = keys
        values = self._keys + rng.choice(len(self.answers), self.pairs, replace=False)
        value_of = dict(zip(given.tolist(), values.tolist(), strict=True))  # the last one counts

        slots = (self.length - 2 * self.pairs) // 2
        weights = np.arange(1, slots + 1) ** (_POWER - 1.0)
        chosen = rng.choice(slots, self._asked, replace=False, p=weights / weights.sum())
        places = 2 * (self.pairs + chosen)

        ids = np.full(self.length, self.padding, dtype=np.int64)
        ids[0 : 2 * self.pairs : 2] = given
        ids[1 : 2 * self.pairs : 2] = values
        ids[places] = keys
        ids[places + 1] = [value_of[key] for key in keys.tolist()]
        return self.padded(ids, places + 1)

    def solve(self, ids: Ids) -> int:
        before = np.flatnonzero(ids[:-1] == ids[-1])
        return int(ids[before[-1] + 1])

    def longer(self, factor: int) -> Task:
        """With as many times the pairs, as far as there are keys for them."""
        most = min(2 * self._keys, len(self.answers)) if self.forgetting else self._keys
        pairs = max(self.pairs, min(factor * self.pairs, most))
        return replace(self, length=factor * self.length, pairs=pairs)

"""Examples by number: a pure function of the task, the seed, the split and the number.

Which examples are held out does not depend on who draws them. A hash of an example puts one of
eight on the side that is never trained on; each split draws until it has one of its own side. So
no example that a model is scored on, of this seed or another, was one that it was trained on, and
an example may come more than once within a split, as it does where there are few.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import numpy as np

from nlscale.data.tasks.task import Example, Ids, Task

_HELD_OUT = 256 // 8
_ATTEMPTS = 1000  # an eighth is missed as often once in 10^58
_MASK = (1 << 64) - 1


class Split(Enum):
    """Whose examples they are; each has its own random numbers."""

    train = 0
    validation = 1
    fresh = 2
    """For scores once a run has ended: held out, as those of validation are."""


def example(task: Task, split: Split, seed: int, number: int) -> Example:
    """Example `number` (0 or more) of a split.

    Raises:
        UserError: the task has so few examples that none is found on the split's side.
    """
    rng = np.random.default_rng([seed & _MASK, split.value, number])
    for _ in range(_ATTEMPTS):
        drawn = task.draw(rng)
        if held_out(drawn.ids) == (split is not Split.train):
            return drawn
    raise task.wrong("it has too few examples to hold some out; make them longer")


def held_out(ids: Ids) -> bool:
    """Whether an example is on the side that is never trained on."""
    return identity(ids)[0] < _HELD_OUT


def identity(ids: Ids) -> bytes:
    """Eight bytes that tell examples apart."""
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()

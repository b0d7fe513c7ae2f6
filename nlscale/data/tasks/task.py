"""What a task is: arguments, symbols, examples of one length, and a solver that is always right.

An example is token ids and a mask over them: whether each token counts as a target. A model that
predicts the next token is trained on the counted ones alone, and scored on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nlscale.config.fields import Range
from nlscale.data.tasks import PREFIX
from nlscale.data.tokenizer import SymbolTokenizer, Tokenizer
from nlscale.errors import UserError

Ids = NDArray[np.int64]

PADDING = "_"
"""Symbol of the last id of every task, which fills examples up and is never counted."""


class Example(NamedTuple):
    """One example of a task."""

    ids: Ids
    """int64 [length]."""
    mask: NDArray[np.bool_]
    """bool [length]: whether the token counts as a target. The first never does: before it stands
    another example, or nothing."""


@dataclass(frozen=True)
class Task(ABC):
    """A kind of example with its arguments, which are the fields of the subclass.

    Subclasses are frozen dataclasses whose fields all have defaults, numbers with their range
    (`nlscale.config.fields.within`), texts without commas and brackets; each has a line in
    `nlscale.data.tasks.table`.

    Raises:
        UserError: an argument outside its range, or sizes that do not go together.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    """What `nlscale eval` calls it and its like."""
    about: ClassVar[str]
    """What is asked, in a few words."""

    def __post_init__(self) -> None:
        for field in arguments(type(self)):
            value, wanted = getattr(self, field.name), field.metadata.get("range", Range())
            if not isinstance(value, str) and not wanted.holds(value):
                raise UserError(
                    f"task {self.name}: {field.name} is {value}; it must be {wanted.without(value)}"
                )
        self.check()

    def check(self) -> None:  # noqa: B027, some have nothing to refuse
        """Refuse sizes that do not go together, by `wrong`."""

    def wrong(self, what: str) -> UserError:
        """An error of this task."""
        return UserError(f"task {self}: {what}")

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of an example; `data.sequence_length` of a run that is trained on it."""

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The symbols of all ids but the last, without spaces."""

    @property
    @abstractmethod
    def answers(self) -> range:
        """The ids that a counted target can be."""

    @abstractmethod
    def draw(self, rng: Generator) -> Example:
        """An example, of random numbers that `rng` gives and nothing else."""

    @abstractmethod
    def solve(self, ids: Ids) -> int:
        """The counted target that follows `ids` (int64 [n], the start of an example)."""

    @abstractmethod
    def longer(self, factor: int) -> Task:
        """The same task with examples `factor` (2 or more) times as long.

        Raises:
            UserError: there is none of that length.
        """

    @property
    def reads(self) -> Sequence[Path]:
        """Files and data folders that examples are made of, beside random numbers."""
        return ()

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its ids."""
        return SymbolTokenizer(f"{PREFIX}{self}", self.symbols)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The symbol of each id."""
        return (*self.words, PADDING)

    @property
    def padding(self) -> int:
        """The last id."""
        return len(self.symbols) - 1

    @property
    def chance(self) -> float:
        """How often a target is guessed by one who takes any of `answers` alike."""
        return 1 / len(self.answers)

    def padded(self, ids: Sequence[int] | Ids, counted: Sequence[int] | Ids) -> Example:
        """An example that begins with `ids`, of which those at the places `counted` count."""
        whole = np.full(self.length, self.padding, dtype=np.int64)
        whole[: len(ids)] = ids
        mask = np.zeros(self.length, dtype=bool)
        mask[list(counted)] = True
        return Example(whole, mask)

    def __str__(self) -> str:
        """As `nlscale.data.tasks.table.task_of` reads it, with every argument."""
        given = ((f.name, getattr(self, f.name)) for f in arguments(type(self)))
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in given)})"


def arguments(kind: type[Task]) -> tuple[Field[Any], ...]:
    """The fields that are its arguments."""
    return fields(kind)


def shown(value: float | bool | str) -> str:
    """An argument as it is typed."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def numbered(letter: str, count: int) -> list[str]:
    """`count` symbols: k0, k1, ..."""
    return [f"{letter}{i}" for i in range(count)]

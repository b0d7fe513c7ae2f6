"""Needles in text, byte by byte: what `nlscale eval needle` asks, for a model to be trained on it.

    ... by lookups. deep-horn is 4590935. Tables that are ... deep-horn is 4590935.

The same prompts (`nlscale.data.needles`), with other random numbers; ids are UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.config.schema import nearest
from nlscale.data.needles.haystack import text_of
from nlscale.data.needles.kinds import FORMS, KINDS
from nlscale.data.needles.prompt import DEPTHS, prompt, smallest, solve
from nlscale.data.tasks.task import Example, Ids, Task
from nlscale.data.tokenizer import ByteTokenizer, Tokenizer


@dataclass(frozen=True)
class TextNeedle(Task):
    """A prompt of one of some kinds, and its answer, which counts."""

    name = "text-needle"
    family = "needle"
    about = "keys with values in text, and at its end a question: the answer"

    length: int = within(512, least=16, most=1 << 22)
    kinds: str = "s1+s2+mk1+mv+mq+vt"
    """Of `nlscale.data.needles.kinds.KINDS`, joined by +; an example is of any of them."""
    form: str = "short"
    """Of `nlscale.data.needles.kinds.FORMS`."""
    haystack: str = "noise"
    """Of the kinds that have text: a data folder, whose training text it is, or a text file; or
    `noise`, a few sentences over and over."""
    shortest: int = within(0, least=0, most=1 << 22)
    """An example is as many prompts as fit, of random lengths from this on: short ones among the
    long are what makes it learnable. 0: one prompt, as long as the example."""

    def check(self) -> None:
        for kind in self.all_kinds:
            if kind not in KINDS:
                raise self.wrong(f"no kind of needle is called {kind!r}; {nearest(kind, KINDS)}")
        if self.form not in FORMS:
            raise self.wrong(f"no form is called {self.form!r}; {nearest(self.form, FORMS)}")
        needed = max(self._needed.values())
        if needed > self.length:
            kind = max(self._needed, key=lambda kind: self._needed[kind])
            raise self.wrong(
                f"needles of kind {kind} take {needed} tokens without any haystack; set length to "
                f"that or more"
            )
        if self.shortest > self.length:
            raise self.wrong("shortest is above length; lower it")

    @property
    def all_kinds(self) -> list[str]:
        """The kinds by name."""
        return self.kinds.split("+")

    @cached_property
    def _needed(self) -> dict[str, int]:
        """Tokens that each kind takes at least."""
        return {kind: smallest(kind, self.form, _bytes) for kind in self.all_kinds}

    @property
    def reads(self) -> Sequence[Path]:
        return () if self.haystack == "noise" else (Path(self.haystack),)

    @property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    @property
    def words(self) -> Sequence[str]:
        return [f"x{byte:02x}" for byte in range(ByteTokenizer.separator)]

    @property
    def answers(self) -> range:
        """ASCII that is printed."""
        return range(32, 127)

    def draw(self, rng: Generator) -> Example:
        text = _training_text(*self.reads) if self.reads else ""
        ids: list[int] = []
        counted: list[int] = []
        while kinds := [k for k, n in self._needed.items() if n <= self.length - len(ids)]:
            kind, room = kinds[int(rng.integers(len(kinds)))], self.length - len(ids)
            least = min(room, max(self._needed[kind], self.shortest))
            size = int(rng.integers(least, room + 1)) if self.shortest else room
            depth = int(rng.integers(DEPTHS)) / (DEPTHS - 1)
            made = prompt(kind, self.form, rng, depth, size, _bytes, text)
            begins = len(ids) + _bytes(made.text)
            ids += (made.text + made.answer).encode()
            counted += range(begins, len(ids))
            ids.append(self.padding)  # which separates documents
            if not self.shortest:
                break
        return self.padded(ids[: self.length], counted)

    def solve(self, ids: Ids) -> int:
        text = bytes(ids.tolist()).rpartition(bytes([self.padding]))[2].decode()
        answer, begun = solve(text)
        return ord(answer[len(begun)])

    def longer(self, factor: int) -> Task:
        """With more of the haystack, in one prompt."""
        return replace(self, length=factor * self.length, shortest=0)


def _bytes(text: str) -> int:
    return len(text.encode())


@cache
def _training_text(haystack: Path) -> str:
    return text_of(haystack, "train")

"""What `nlscale generate` shows: the texts on standard output, what they took on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nlscale.telemetry.terminal import is_terminal

if TYPE_CHECKING:  # torch is slow to import, and --help needs none
    from nlscale.generate.text import Continuation

_LINE_SECONDS = 5.0
_LINES_OF_A_TIME = 20
"""A line after 5 seconds, later after a twentieth of the time so far."""
_PICTURES = {
    **{c: 0x2400 + c for c in range(32) if c not in (9, 10)},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}
"""What stands in a terminal for characters that would move its cursor, or worse."""


class Paper:
    """Standard output: in a terminal, what is not the model's is dim, and nothing moves the cursor.

    Args:
        prompt: repeated before each text, "" for none.
    """

    def __init__(self, prompt: str) -> None:
        self.terminal = is_terminal()
        self._prompt = prompt
        self._line_ended = True

    def prompt(self) -> None:
        """Repeat it."""
        self._put(self._prompt, dim=True)

    def text(self, text: str) -> None:
        """What the model wrote."""
        self._put(text)

    def headline(self, text: str) -> None:
        """A line of its own."""
        self._put(f"{text}\n", dim=True)

    def end(self) -> None:
        """End the line."""
        if not self._line_ended:
            self._put("\n")

    def _put(self, text: str, dim: bool = False) -> None:
        if not text:
            return
        self._line_ended = text.endswith("\n")
        if self.terminal:
            text = text.translate(_PICTURES)
        print(_dimmed(text, self.terminal) if dim else text, end="", flush=True)


def _dimmed(text: str, terminal: bool) -> str:
    return f"\x1b[2m{text}\x1b[22m" if terminal and "NO_COLOR" not in os.environ else text


@contextmanager
def reading(total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how far reading has come, where it takes long.

    Yields a function to call with how many tokens were read since; of `total` they are all.
    """
    began, done = monotonic(), 0
    with _bar(total) if sys.stderr.isatty() else _lines() as show:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            seconds = max(monotonic() - began, 1e-9)
            show(done, f"{done:,} of {total:,} tokens, {done / seconds:,.0f} tokens/s", seconds)

        yield advance


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, str, float], None]]:
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[text]}, ETA"))
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=total, text=f"{total:,} tokens")
        yield lambda done, text, seconds: bar.update(task, completed=done, text=text)


@contextmanager
def _lines() -> Iterator[Callable[[int, str, float], None]]:
    shown = 0.0

    def show(done: int, text: str, seconds: float) -> None:
        nonlocal shown
        if seconds - shown >= max(_LINE_SECONDS, seconds / _LINES_OF_A_TIME):
            shown = seconds
            print(f"reading: {text}", file=sys.stderr, flush=True)

    yield show


def say_what_it_took(
    results: Sequence[Continuation],
    reading: float,
    seconds: float,
    state: tuple[Path, int] | None,
) -> None:
    """The last line, on standard error.

    Args:
        results: at least one, of one prompt.
        reading, seconds: that reading the prompt and generating took.
        state: the file that was saved, and the tokens of the sequence in it.
    """
    count = sum(len(one.ids) for one in results)
    parts = []
    if count:
        samples = f" of {len(results)} samples" if len(results) > 1 else ""
        parts.append(
            f"{count:,} tokens{samples} in {seconds:.1f} s, {count / seconds:,.0f} tokens/s"
        )
        parts.append("ended: " + ", ".join(dict.fromkeys(one.ended for one in results)))
    read = results[0].prompt_tokens
    parts.append(f"read {read:,} token{'s' * (read != 1)} in {reading:.1f} s")
    if state is not None:
        parts.append(f"{state[0]} holds {state[1]:,} tokens")
    line = "; ".join(parts)
    print(_dimmed(line, sys.stderr.isatty()), file=sys.stderr, flush=True)

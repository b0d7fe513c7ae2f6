"""What a bench is at, a line each on standard error, so that a cut-off one leaves a trace too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from nlscale.cluster.life.place import place

Part = TypeVar("Part")


def each(name: str, parts: Sequence[Part], label: Callable[[Part], str]) -> Iterator[Part]:
    """The parts one by one; the first rank says which is begun, and how long the rest may take.

    Args:
        name: of the bench.
        parts: of about the same length each.
        label: what a part is.
    """
    started = time.monotonic()
    for done, part in enumerate(parts):
        if place().rank == 0:
            line = f"nlscale bench {name}: {done + 1} of {len(parts)}, {label(part)}"
            if done:
                left = (time.monotonic() - started) / done * (len(parts) - done)
                line += f", about {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
        yield part

"""What `nlscale bench device` measures, in its order: the cheapest and most decisive first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nlscale.errors import UserError
from nlscale.ops.memory.kernels.sizes import SIZES

_HERE = "nlscale.verify.device.measures"
TORCH = "torch"
"""The row of a Transformer in torch alone."""


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own."""

    name: str
    what: str
    measure: str
    """`module:function`, called with a folder, whether sizes are tiny, and `given`; returns what
    JSON can hold, and under `says` a line of it."""
    about: float
    """Seconds that it may take on a GPU of today: whether it is begun follows from it."""
    most: float
    """Seconds after which it is ended."""
    given: Mapping[str, Any] = field(default_factory=dict)
    by_all: bool = False
    """Every rank takes part, at the same time; of the others the first does it alone."""
    several: bool = False
    """Only where there are several ranks."""


@dataclass(frozen=True)
class StepSize:
    """Of a whole training step."""

    what: str
    recipe: str
    batch: int
    length: int
    rows: tuple[str, ...]
    """Mixers, and torch alone."""


_ROWS = ("hope", "attention", TORCH, "gated-delta")
STEPS = {
    "4k": StepSize("340M, 8 x 4096", "hope-340m", 8, 4096, _ROWS),
    "16k": StepSize("340M, 2 x 16384", "hope-340m", 2, 16384, _ROWS),
    "1b": StepSize("1.3B, 4 x 4096", "hope-1.3b", 4, 4096, _ROWS[:3]),
}
SCANS = {"4k": "8x4096x16x64", "16k": "2x16384x16x64", "d128": "8x4096x8x128"}


def _kernels(chunk: int, head: int) -> Part:
    what = f"kernels against float64, chunks of {chunk}, heads of {head}: reads, every gradient"
    given = {"chunk": chunk, "head": head}
    # most of it compiling, by one core; heads of 128 take twice as long
    about = 90 if head > 64 else 45
    return Part(f"kernels.{chunk}.{head}", what, f"{_HERE}:kernels", about, 420, given)


def _scan(name: str) -> Part:
    what = f"the scan beside softmax attention and its floors, {SCANS[name]}"
    return Part(f"scan.{name}", what, f"{_HERE}:scan", 20, 120, {"size": name})


def _steps(name: str) -> list[Part]:
    size = STEPS[name]
    return [
        Part(
            f"step.{name}.{row}",
            f"whole training steps, {size.what}, {row}{' alone' if row == TORCH else ''}",
            f"{_HERE}:step",
            60,
            240,
            {"size": name, "row": row},
        )
        for row in size.rows
    ]


PARTS = (
    Part("device", "the device, versions and clocks", f"{_HERE}:device", 5, 60, by_all=True),
    Part("ceilings", "a matrix product and a copy", f"{_HERE}:ceilings_of", 5, 60, by_all=True),
    _kernels(64, 64),
    _scan("4k"),
    Part("links", "all-reduces in and between nodes", f"{_HERE}:links", 30, 180, {}, True, True),
    *_steps("4k"),
    _kernels(64, 128),
    Part("costs", "a profile of steps of hope at 4k", f"{_HERE}:costs", 60, 180),
    Part("overlap", "reductions that overlap", f"{_HERE}:overlap", 60, 240, {}, True, True),
    _scan("16k"),
    *_steps("16k"),
    *_steps("1b"),
    Part("curves", "the quickstart with kernels and without", f"{_HERE}:curves", 120, 400),
    Part("decode", "decoding, token by token", f"{_HERE}:decode", 60, 240),
    _scan("d128"),
    *(_kernels(*size) for size in SIZES if size not in ((64, 64), (64, 128))),
)


def named(only: Sequence[str] | None, ranks: int) -> list[Part]:
    """The parts with these names, or below them (`step` or `step.4k`); all, where none is given.

    Raises:
        UserError: there is none of a name, or it needs several ranks.
    """
    found: list[Part] = []
    for name in only or ():
        of_it = [part for part in PARTS if f"{part.name}.".startswith(f"{name}.")]
        if not of_it:
            names = ", ".join(part.name for part in PARTS)
            raise UserError(f"--only {name}: there is no such part; choose of {names}")
        if ranks == 1 and all(part.several for part in of_it):
            raise UserError(f"--only {name} needs several ranks: start it with torchrun")
        found += of_it
    chosen = [part for part in PARTS if not only or part in found]
    return [part for part in chosen if ranks > 1 or not part.several]

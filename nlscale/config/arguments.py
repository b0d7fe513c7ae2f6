"""Types of command-line arguments: paths, and numbers of a range. No torch is imported."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlscale.config import scalars
from nlscale.config.fields import Range, expanded

_FIGURES = (".png", ".svg", ".pdf")


def path(text: str) -> Path:
    """A `type` of argparse: a file or folder, as keys of recipes take one."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def figure(text: str) -> Path:
    """A `type` of argparse: the file of a figure, of a format that can be drawn."""
    out = path(text)
    if out.suffix not in _FIGURES or out.is_dir():
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(_FIGURES)}, and be a file")
    return out


def size(text: str) -> int:
    """A `type` of argparse: a whole number with KiB, MiB or GiB behind it, or by itself."""
    match = re.fullmatch(r"([1-9][0-9]{0,11}) ?(|KiB|MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64MiB, or a whole number")
    return int(match[1]) << (10 * ("", "KiB", "MiB", "GiB").index(match[2]))


def whole(**ends: float) -> Callable[[str], int]:
    """A `type` of argparse: whole numbers of a `Range`, such as `whole(least=1)`."""
    return _of_range(int, "a whole number", Range(**ends))


def number(**ends: float) -> Callable[[str], float]:
    """A `type` of argparse: finite numbers of a `Range`, such as `number(above=0, below=1)`."""
    return _of_range(float, "a number", Range(**ends))


def _of_range(kind: type, what: str, wanted: Range) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = scalars.read(text, kind)
        except scalars.Unreadable as error:
            fix = f"; {error}" if str(error) else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{fix}") from None
        if not wanted.holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted.without(value)}")
        return value

    return read

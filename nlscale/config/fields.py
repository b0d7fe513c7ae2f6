"""What a field of a configuration class may hold beside its type: a range, a name, a path."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nlscale.errors import UserError

MOST = 2**31 - 1
"""Of sizes: what an index of 32 bits reaches."""
_LARGEST = 2**63 - 1
_LONGEST_NAME = 255
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.@_-]+:/{1,2}")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


@dataclass(frozen=True)
class Range:
    """Numbers between two ends; always finite, and whole ones at most 2^63 - 1."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is in it."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not isinstance(value, int) or abs(value) <= _LARGEST)
        )

    def without(self, value: float) -> str:
        """What a number that it does not hold must be, in words."""
        if not math.isfinite(value):
            return str(self) if str(self).endswith("finite number") else f"finite and {self}"
        return (
            f"{self} and of at most 63 bits"
            if isinstance(value, int) and abs(value) > _LARGEST
            else str(self)
        )

    def __str__(self) -> str:
        """Such as "above 0" or "from 0 to 1"."""
        low = f"{self.least:g} or above" if self.least is not None else ""
        if self.above is not None:
            low = f"above {self.above:g}"
        if self.most is not None:
            if self.least is not None:
                return f"from {self.least:g} to {self.most:,.12g}"
            return f"{low} and at most {self.most:,.12g}".removeprefix(" and ")
        if self.below is not None:
            low = f"at least {self.least:g}" if self.least is not None else low
            return f"{low} and below {self.below:g}".removeprefix(" and ")
        return low or "a finite number"


def one_of(names: list[str]) -> Any:
    """A field that takes one of some names, the first by default. Packages may add names."""
    return field(default=names[0], metadata={"names": names})


def within(default: Any = MISSING, **ends: float) -> Any:
    """A field of numbers of a `Range`; of each, where it is a list. A list is empty by default."""
    found = {"range": Range(**ends)}
    if default == []:
        return field(default_factory=list, metadata=found)
    return field(default=default, metadata=found)


def or_list(default: int, item: type, **ends: float) -> Any:
    """A field of a whole number of a `Range`, or of a list of sections of a class.

    OmegaConf knows no such type: the field is annotated with one that is Any when the program runs.
    """
    return field(default=default, metadata={"range": Range(**ends), "or_list_of": item})


def path(default: Any = MISSING, url: bool = False) -> Any:
    """A field that names a file or folder, see `expanded`; `url`: or has a URL instead."""
    return field(default=default, metadata={"path": True, "url": url})


def path_of(given: str | os.PathLike[str]) -> Path:
    """The path that a person means, of a Python call.

    Raises:
        UserError: see `expanded`.
    """
    try:
        return expanded(given)
    except ValueError as error:
        raise UserError(f"{os.fspath(given)!r} {error}") from None


def expanded(text: str | os.PathLike[str]) -> Path:
    """The path that a person means: `~` and `~user` are their homes.

    Raises:
        ValueError: it is empty or holds control characters; has a scheme such as s3://; or holds a
            variable that no shell has expanded. The text says what to do.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("is empty; give a path")
    if text != text.strip():
        raise ValueError("begins or ends with a space; take it out")
    if max(len(os.fsencode(part)) for part in text.split("/")) > _LONGEST_NAME:
        raise ValueError(f"has a name of more than {_LONGEST_NAME} bytes; give a shorter one")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("holds a control character; give a path without")
    if scheme := _SCHEME.match(text):
        raise ValueError(
            f"is not a path: {scheme[0]} names a service, and files are read and written through "
            f"the file system; mount it, or give a folder that all nodes share"
        )
    if variable := _VARIABLE.search(text):
        raise ValueError(
            f"holds {variable[0]}, which is not expanded here; write the path out, or let the "
            f"shell expand it (no single quotes)"
        )
    if not text.startswith("~"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"begins with {text.split('/')[0]}, which is nobody's home here") from None

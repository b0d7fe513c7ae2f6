"""Counting what is not read, by kind, and naming the first of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NAMED = 20  # of each kind, and in all; a corpus can have millions of them
_WORDS = 6


@dataclass
class Kind:
    """How many there are of a kind, their bytes, and the first: name, and why in full."""

    count: int = 0
    bytes: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Kind) -> None:
        """Count those of another, too."""
        self.count += other.count
        self.bytes += other.bytes
        self.first += other.first[: NAMED - len(self.first)]


class Tally:
    """How many things there are of each kind.

    Fields: `kinds` by name; `first`, the first few things: name, and why in full.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}
        self.first: list[tuple[str, str]] = []

    @property
    def count(self) -> int:
        return sum(kind.count for kind in self.kinds.values())

    @property
    def bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())

    def add(self, kind: str, name: str, why: str = "", size: int = 0) -> None:
        """Take note of one, of `size` bytes."""
        entry = self.kinds.setdefault(kind, Kind())
        entry.count += 1
        entry.bytes += size
        if len(entry.first) < NAMED:
            entry.first.append((name, why or kind))
        if len(self.first) < NAMED:
            self.first.append((name, why or kind))

    def merge(self, other: Tally) -> None:
        """Add all that another has counted."""
        for name, kind in other.kinds.items():
            self.kinds.setdefault(name, Kind()).add(kind)
        self.first += other.first[: NAMED - len(self.first)]

    def scale(self, numerator: int, denominator: int) -> None:
        """Count bytes as this share of what they were, rounded down."""
        for kind in self.kinds.values():
            kind.bytes = kind.bytes * numerator // max(1, denominator)

    def plain(self) -> list[Any]:
        """It as JSON holds it; see `of`."""
        kinds = {name: [kind.count, kind.bytes, kind.first] for name, kind in self.kinds.items()}
        return [kinds, self.first]

    @classmethod
    def of(cls, plain: list[Any]) -> Tally:
        """One of which `plain` has been kept."""
        tally = cls()
        kinds, first = plain
        for name, (count, size, some) in kinds.items():
            tally.kinds[name] = Kind(count, size, [(path, why) for path, why in some])
        tally.first = [(path, why) for path, why in first]
        return tally

    def largest(self, most: int) -> list[tuple[str, Kind]]:
        """The kinds with most bytes, then the most frequent, and the others as one."""
        kinds = sorted(self.kinds.items(), key=lambda k: (-k[1].bytes, -k[1].count, k[0]))
        others = kinds[most:]
        if not others:
            return kinds
        rest = Kind()
        for _, kind in others:
            rest.add(kind)
        return [*kinds[:most], (f"{len(others):,} other kinds", rest)]

    def words(self) -> str:
        """In words: `.csv 3 (1.2 MiB), hidden 2`."""
        return ", ".join(
            f"{shown(name, 40)} {kind.count:,}" + (f" ({mib(kind.bytes)})" if kind.bytes else "")
            for name, kind in self.largest(_WORDS)
        )


def mib(size: int) -> str:
    """A number of bytes in words."""
    return f"{size:,} bytes" if size < 1 << 20 else f"{size / 2**20:,.1f} MiB"


def shown(name: str, most: int = 1000) -> str:
    """A name, or its first `most` characters, in one line: what would not show is escaped."""
    if len(name) > most:
        name = name[: most - 3] + "..."
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)

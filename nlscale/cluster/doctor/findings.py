"""A finding: one check, how it stands, what was measured, and what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum


class Grade(str, Enum):
    """How a check stands, the best first."""

    ok = "ok"
    note = "note"
    """Worth knowing; nothing is wrong."""
    warning = "warning"
    """Training runs, but slower or less safely than it should."""
    error = "error"
    """Training would fail or hang, or checkpoints would be lost."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    """What was checked, such as `disk speed`."""
    grade: Grade
    measured: str
    """What was found, with numbers and units."""
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""
    hosts: tuple[str, ...] = ()
    """The hosts that it is true of; empty: of all together."""


def worst(findings: Iterable[Finding]) -> Grade:
    """The worst grade of some findings; ok of none."""
    order = list(Grade)
    return max((finding.grade for finding in findings), key=order.index, default=Grade.ok)


def merged(findings: Iterable[Finding], hosts: Iterable[str]) -> list[Finding]:
    """Findings that differ in nothing but their host as one, in the order of the first of them.

    Args:
        findings: as the judges of single hosts return them.
        hosts: all hosts; what is true of every one of them is said without naming any.
    """
    everyone = set(hosts)
    together: dict[Finding, list[str]] = {}
    for finding in findings:
        together.setdefault(replace(finding, hosts=()), []).extend(finding.hosts)
    return [
        replace(finding, hosts=() if everyone <= set(named) else tuple(dict.fromkeys(named)))
        for finding, named in together.items()
    ]


def span(values: Iterable[float], text: Callable[[float], str]) -> str:
    """`1.2 GB/s` where all values read alike, else `0.9 GB/s to 1.2 GB/s`."""
    values = list(values)
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def plural(count: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def far_below(values: dict[str, float], share: float = 0.5) -> list[str]:
    """The names whose value is below that share of the median."""
    middle = statistics.median(values.values())
    return [name for name, value in values.items() if value < share * middle]

"""What a device is to reach, and a verdict on each from what was measured there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nlscale.verify.device.parts import PARTS, STEPS, TORCH
from nlscale.verify.device.records import Record, State

Found = Mapping[str, dict[str, Any]]
"""Results of the parts that are done, by part."""


class Judgement(str, Enum):
    """Of a goal."""

    met = "met"
    missed = "missed"
    unknown = "not measured"
    no_goal = "no goal here"
    """Sizes are tiny, or it is no GPU: the figure says nothing of it."""


@dataclass(frozen=True)
class Goal:
    """Something that a device is to reach."""

    what: str
    needs: tuple[str, ...]
    """Parts that it is measured by: all of them."""
    value: Callable[[Found], float]
    bound: float
    least: bool = False
    """Whether the value is to be at least the bound; else at most."""
    everywhere: bool = False
    """Whether it is one on a CPU and at tiny sizes, too: something is right, or is not."""


@dataclass(frozen=True)
class Verdict:
    """On a goal."""

    what: str
    judgement: Judgement
    value: float | None
    bound: float
    least: bool
    why: str = ""
    """Parts that ended without what it needs."""


def _speed(found: Found, size: str, row: str, beside: str) -> float:
    speeds = (found[f"step.{size}.{name}"]["tokens_per_second"] for name in (row, beside))
    mine, theirs = speeds
    return float(mine / theirs)


def _of_transformer(size: str, least: float) -> Goal:
    return Goal(
        f"speed of Hope over the Transformer's, {STEPS[size].what}",
        (f"step.{size}.hope", f"step.{size}.attention"),
        lambda found: _speed(found, size, "hope", "attention"),
        least,
        True,
    )


def _of_torch(size: str) -> Goal:
    return Goal(
        f"speed of the Transformer over plain torch, {STEPS[size].what}",
        (f"step.{size}.attention", f"step.{size}.{TORCH}"),
        lambda found: _speed(found, size, "attention", TORCH),
        0.95,
        True,
    )


def _of_plan(size: str) -> Goal:
    mixers = [row for row in STEPS[size].rows if row != TORCH]

    def largest(found: Found) -> float:
        rows = [found[f"step.{size}.{mixer}"] for mixer in mixers]
        return float(max(row["peak_memory_bytes"] / row["planned_memory_bytes"] for row in rows))

    return Goal(
        f"peak memory over the plan's, {STEPS[size].what}",
        tuple(f"step.{size}.{mixer}" for mixer in mixers),
        largest,
        1.1,
    )


_KERNELS = tuple(part.name for part in PARTS if part.name.startswith("kernels."))
GOALS = (
    Goal(
        "error of the worst kernel over its bound",
        _KERNELS,
        lambda found: max(float(found[name]["worst"]) for name in _KERNELS if name in found),
        1.0,
        everywhere=True,
    ),
    _of_transformer("4k", 1.0),
    _of_transformer("16k", 1.8),
    *map(_of_torch, STEPS),
    *map(_of_plan, STEPS),
    Goal(
        "time of the scan over its floor, 8 x 4096",
        ("scan.4k",),
        lambda found: float(found["scan.4k"]["of_floor"]),
        2.0,
    ),
    Goal(
        "waits of the host in a step",
        ("costs",),
        lambda found: float(found["costs"]["host_waits"]),
        1.0,
    ),
    Goal(
        "difference of decoding and of reading at once, over its bound",
        ("decode",),
        lambda found: float(found["decode"]["worst"]),
        1.0,
        everywhere=True,
    ),
    Goal(
        "difference of the final losses with kernels and without, over its bound",
        ("curves",),
        lambda found: found["curves"]["final_difference"] / found["curves"]["bound"],
        1.0,
    ),
)


def verdicts(records: Mapping[str, Record]) -> list[Verdict]:
    """On every goal; on a CPU or at tiny sizes most are neither met nor missed."""
    found = {
        name: record.result
        for name, record in records.items()
        if record.state == State.done and record.result is not None
    }
    about = found.get("device")
    counts = about is not None and about["gpu"] is not None and about["sizes"] == "full"
    return [_verdict(goal, records, found, counts) for goal in GOALS]


def _verdict(goal: Goal, records: Mapping[str, Record], found: Found, counts: bool) -> Verdict:
    missing = [name for name in goal.needs if name not in found]
    # one that is wrong is wrong, whatever the others will say
    wrong = goal.everywhere and len(missing) < len(goal.needs) and goal.value(found) > goal.bound
    if missing and not wrong:
        begun = [records[name] for name in missing if name in records]
        why = ", ".join(f"{record.part} {record.state.value}" for record in begun)
        return Verdict(goal.what, Judgement.unknown, None, goal.bound, goal.least, why)
    if not (counts or goal.everywhere):
        return Verdict(goal.what, Judgement.no_goal, None, goal.bound, goal.least)
    value = goal.value(found)
    met = value >= goal.bound if goal.least else value <= goal.bound
    judgement = Judgement.met if met else Judgement.missed
    return Verdict(goal.what, judgement, value, goal.bound, goal.least)

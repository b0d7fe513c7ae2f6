"""What lies in the folder of `nlscale bench device`: a record a part, which a later call reads.

DIR/page/           the page, its figures, and all of it as device.json
DIR/parts/NAME.json what a part has found; NAME.log what it printed; NAME/ what it left
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.telemetry.files import read_object, replace, to_json

IDENTITY = ("device", "ranks", "torch", "triton", "ptxas", "nlscale", "sizes")
"""What all parts of a folder have in common: ratios of what two versions did would say nothing."""


class State(str, Enum):
    """How a part ended."""

    done = "done"
    failed = "failed"
    too_long = "took too long"
    cut = "cut off"
    """The minutes of the call were over before its own."""
    not_begun = "not begun"


@dataclass
class Record:
    """A part that was begun."""

    part: str
    what: str
    """It measures."""
    state: State
    seconds: float
    began: str
    """UTC, ISO 8601."""
    nlscale: str
    """Version, and the commit where it is known."""
    result: dict[str, Any] | None = None
    others: list[dict[str, Any]] = field(default_factory=list)
    """What the other ranks have found, in their order, where all took part."""
    error: str | None = None

    @property
    def says(self) -> str:
        """A line of what it has found, or why there is nothing."""
        if self.result is not None:
            return str(self.result["says"])
        return self.error or ""


class Folder:
    """Of one device, or one cluster."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    def log(self, part: str, rank: int = 0) -> Path:
        return self.parts / (f"{part}.rank{rank}.log" if rank else f"{part}.log")

    def scratch(self, part: str) -> Path:
        """What a part may leave files in."""
        return self.parts / part

    def records(self) -> dict[str, Record]:
        """By part.

        Raises:
            UserError: a file there is no record of a part.
        """
        found = {}
        for path in sorted(self.parts.glob("*.json")):
            try:
                plain = read_object(path)
                record = Record(**{**plain, "state": State(plain["state"])})
            except (UserError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} is damaged ({type(error).__name__}: {error}); remove it, and the part "
                    f"is measured again"
                ) from None
            found[record.part] = record
        return found

    def write(self, record: Record) -> None:
        """Whole or not at all."""
        self.parts.mkdir(parents=True, exist_ok=True)
        text = to_json(asdict(record), indent=1) + "\n"
        replace(self.parts / f"{record.part}.json", text.encode())

    def check_same(self, before: Record | None, now: dict[str, Any]) -> None:
        """Refuse to mix what was measured on two devices, or with two compilers.

        Args:
            before: the record of the part `device`; None: nothing was measured yet.
            now: what that part has found now.

        Raises:
            UserError: they differ.
        """
        if before is None or before.result is None:
            return
        for name in IDENTITY:
            if before.result.get(name) != now[name]:
                raise UserError(
                    f"{self.path} holds measurements with {name} {before.result.get(name)}, and "
                    f"this is {now[name]}; give another --out"
                )

"""Cutting what the sources hold into units, and keeping what is to be built of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlscale.data.building.options import Options
from nlscale.data.documents import SourceFile
from nlscale.data.index import write_json
from nlscale.data.losses import Losses, judged_bytes_of
from nlscale.data.sources import Found
from nlscale.data.tally import Tally

MOST_UNITS = 4096
"""About; with more bytes a unit is larger. A unit has shards of its own."""
_FORM = 2
"""Of the plan, and of what is made of its units. A build of another one is begun anew."""
_PLAN, _FILES = "plan.json", "files.jsonl"


@dataclass(frozen=True)
class Unit:
    """Some of the files, which follow one another."""

    number: int
    files: int
    bytes: int
    at: int
    """Where they begin in the list of files."""


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    `identity` is the fingerprint of the index to be: of files and options; `asked` of the options
    alone; `found` what the sources hold beside the files, as JSON.
    """

    identity: str
    asked: str
    options: Options
    units: list[Unit]
    found: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of the files to read."""
        return sum(unit.bytes for unit in self.units)


def cut(files: Sequence[SourceFile], unit_bytes: int) -> list[int]:
    """How many of the files, in their order, belong to each unit; of about evenly many bytes.

    Args:
        files: at least one
        unit_bytes: about how many bytes a unit has at most; a file is never cut
    """
    total = sum(file.size for file in files)
    wanted = max(1, min(MOST_UNITS, -(-total // unit_bytes)))
    counts = [0] * wanted
    before = 0
    for file in files:
        middle = 2 * before + file.size
        counts[min(wanted - 1, middle * wanted // max(1, 2 * total))] += 1
        before += file.size
    return [count for count in counts if count]


def write_plan(folder: Path, identity: str, asked: str, options: Options, found: Found) -> Plan:
    """Cut the files into units, and keep that in a folder, the plan last. Raises OSError."""
    units: list[Unit] = []
    files = iter(found.files)
    with open(folder / _FILES, "wb") as out:
        for number, count in enumerate(cut(found.files, options.unit_bytes)):
            at, size = out.tell(), 0
            for _ in range(count):
                file = next(files)
                size += file.size
                out.write(_line(file))
            units.append(Unit(number, count, size, at))
    lost = {str(group): tally.plain() for group, tally in found.lost.items()}
    beside = {
        "names": found.names,
        "judged": found.judged,
        "left_out": found.left_out.plain(),
        "left_bytes": found.left_bytes,
        "lost": lost,
        "judged_bytes": judged_bytes_of(found),
    }
    plan = Plan(identity, asked, options, units, beside)
    write_json(folder / _PLAN, {"form": _FORM, **asdict(plan)})
    return plan


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder; None where there is none to go on from. Raises OSError."""
    try:
        plain = json.loads((folder / _PLAN).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    # What another version has made of its units means something else, too.
    if not isinstance(plain, dict) or plain.pop("form", None) != _FORM:
        return None
    options = Options(**plain.pop("options"))
    units = [Unit(**unit) for unit in plain.pop("units")]
    return Plan(options=options, units=units, **plain)


def any_plan(folder: Path) -> bool:
    """Whether a folder has a plan, also one that `read_plan` does not know."""
    return (folder / _PLAN).is_file()


def forget_plan(folder: Path) -> None:
    """What is in the folder is of no plan any more. Raises OSError."""
    (folder / _PLAN).unlink(missing_ok=True)


def files_of(folder: Path, unit: Unit) -> Iterator[SourceFile]:
    """The files of a unit, in their order. Raises OSError."""
    with open(folder / _FILES, "rb") as lines:
        lines.seek(unit.at)
        for _ in range(unit.files):
            path, name, size, mtime_ns, group = json.loads(lines.readline())
            yield SourceFile(Path(path), name, size, mtime_ns, group)


def losses_of(plan: Plan) -> Losses:
    """What is lost before anything is read."""
    return Losses(found_of(plan), plan.options.text_field, plan.found["judged_bytes"])


def found_of(plan: Plan) -> Found:
    """What the sources hold beside the files."""
    found, plain = Found(), plan.found
    found.names, found.judged = plain["names"], plain["judged"]
    found.left_out, found.left_bytes = Tally.of(plain["left_out"]), plain["left_bytes"]
    found.lost = {int(group): Tally.of(tally) for group, tally in plain["lost"].items()}
    return found


def first_change(folder: Path, files: Iterable[SourceFile]) -> str:
    """The path of the first file that is not as the list in a folder has it. Raises OSError."""
    with open(folder / _FILES, "rb") as lines:
        for file in files:
            if lines.readline() != _line(file):
                return str(file.path)
        rest = lines.readline()
    return str(json.loads(rest)[0]) if rest else "nothing"


def _line(file: SourceFile) -> bytes:
    return json.dumps([str(file.path), *file[1:]]).encode() + b"\n"

"""Cutting what the sources hold into units, and keeping what is to be built of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlscale.data.building.options import Options
from nlscale.data.documents import SourceFile
from nlscale.data.index import write_json
from nlscale.data.losses import Losses, judged_bytes_of
from nlscale.data.sources import Found, fingerprint
from nlscale.data.tally import Tally

MOST_UNITS = 4096
"""About; with more bytes a unit is larger. A unit has shards of its own."""
_FORM = 3
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
    folder: int
    """The number of the data folder that they are built into."""


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    `identity` is the fingerprint of all files and options; `asked` of the options alone; `folders`,
    of each data folder that is built its `name`, as in `folder_fingerprint`, and what its sources
    hold beside the files, as JSON. Units of one folder follow one another.
    """

    identity: str
    asked: str
    options: Options
    units: list[Unit]
    folders: list[dict[str, Any]]

    @property
    def bytes(self) -> int:
        """Of the files to read."""
        return sum(unit.bytes for unit in self.units)

    def units_of(self, folder: int) -> list[Unit]:
        """Those of a data folder."""
        return [unit for unit in self.units if unit.folder == folder]

    def fingerprint_of(self, folder: int) -> str:
        """Of the index of a data folder."""
        return folder_fingerprint(self.identity, self.folders[folder]["name"])


def folder_fingerprint(identity: str, name: str) -> str:
    """Of the index of one of the data folders of a build; `name` is "" where it is the only one."""
    return fingerprint([], [identity, name]) if name else identity


def cut(files: Sequence[SourceFile], unit_bytes: int, most: int = MOST_UNITS) -> list[int]:
    """How many of the files, in their order, belong to each unit; of about evenly many bytes.

    Args:
        files: at least one
        unit_bytes: about how many bytes a unit has at most; a file is never cut
        most: units; with more bytes they are larger
    """
    total = sum(file.size for file in files)
    wanted = max(1, min(most, -(-total // unit_bytes)))
    counts = [0] * wanted
    before = 0
    for file in files:
        middle = 2 * before + file.size
        counts[min(wanted - 1, middle * wanted // max(1, 2 * total))] += 1
        before += file.size
    return [count for count in counts if count]


def write_plan(
    folder: Path, identity: str, asked: str, options: Options, founds: Mapping[str, Found]
) -> Plan:
    """Cut the files of each data folder into units, and keep that in a folder, the plan last.

    Args:
        folder: where that is kept.
        identity, asked, options: as of `Plan`.
        founds: what the sources of each data folder hold, by its name.

    Raises:
        OSError: the disk does.
    """
    units: list[Unit] = []
    total = max(1, sum(found.bytes for found in founds.values()))
    with open(folder / _FILES, "wb") as out:
        for number, found in enumerate(founds.values()):
            files = iter(found.files)
            most = max(1, MOST_UNITS * found.bytes // total)
            for count in cut(found.files, options.unit_bytes, most):
                at, size = out.tell(), 0
                for _ in range(count):
                    file = next(files)
                    size += file.size
                    out.write(_line(file))
                units.append(Unit(len(units), count, size, at, number))
    folders = [{"name": name, **_beside(found)} for name, found in founds.items()]
    plan = Plan(identity, asked, options, units, folders)
    write_json(folder / _PLAN, {"form": _FORM, **asdict(plan)})
    return plan


def _beside(found: Found) -> dict[str, Any]:
    """What it holds beside the files, as JSON."""
    return {
        "names": found.names,
        "judged": found.judged,
        "left_out": found.left_out.plain(),
        "left_bytes": found.left_bytes,
        "lost": {str(group): tally.plain() for group, tally in found.lost.items()},
        "judged_bytes": judged_bytes_of(found),
    }


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


def losses_of(plan: Plan, folder: int) -> Losses:
    """What the sources of a data folder lose before anything is read."""
    judged_bytes = plan.folders[folder]["judged_bytes"]
    return Losses(found_of(plan, folder), plan.options.text_field, judged_bytes)


def found_of(plan: Plan, folder: int) -> Found:
    """What the sources of a data folder hold beside the files."""
    found, plain = Found(), plan.folders[folder]
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

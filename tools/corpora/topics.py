"""Labelled text by topic from a Debian or Ubuntu machine: package descriptions and their sections.

    python tools/corpora/topics.py --out data/topics

reads the lists of packages that this system has (/var/lib/apt/lists, by `apt-cache dumpavail`; no
network, and `apt-get update` makes them where there are none), and writes a file a task,
OUT/TASK.jsonl: a record a package, {"prompt": "Description. ", "completion": "section"}. Each is
then a source: `nlscale data build --source data/topics/desktop.jsonl ...`, of which the sections
are learned. Tasks have sections of their own, so that the next one brings new classes; a
description that occurs several times is left out but for the first. With --list FILE that file is
read, such as a Packages of a mirror.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

TOPICS = {
    "languages": ("perl", "rust", "haskell"),
    "desktop": ("games", "fonts", "sound"),
    "science": ("gnu-r", "science", "electronics"),
}
"""Sections of each task."""


class Unreadable(Exception):
    """There are no lists, or they lack a section; says what to do."""


def packages_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Section and description of each package of a list, in its order."""
    found: dict[str, str] = {}
    for line in [*lines, ""]:
        if not line.strip():
            if "Section" in found and "Description" in found:
                # of contrib and non-free the area stands before the section
                yield found["Section"].rpartition("/")[2], found["Description"]
            found = {}
        elif not line[0].isspace():
            key, _, value = line.partition(":")
            found[key] = value.strip()


def available() -> str:
    """What this system's lists say of all packages."""
    try:
        found = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True)
    except FileNotFoundError as error:
        raise Unreadable("apt-cache is not here: this needs Debian or Ubuntu, or --list") from error
    except subprocess.CalledProcessError as error:
        raise Unreadable(error.stderr.decode().strip()) from error
    return found.stdout.decode("utf-8", "replace")


def records(text: str, most: int) -> dict[str, list[dict[str, str]]]:
    """Those of each task, by hash of the description: in an order that says nothing.

    Args:
        text: of the list.
        most: of a section.
    """
    by_section: dict[str, list[str]] = {s: [] for own in TOPICS.values() for s in own}
    seen: set[str] = set()
    for section, description in packages_of(text.splitlines()):
        if section in by_section and description not in seen:
            seen.add(description)
            by_section[section].append(description)
    if missing := [section for section, own in by_section.items() if not own]:
        raise Unreadable(
            f"no package of section {missing[0]} in the list; is `apt-get update` needed?"
        )

    def order(description: str) -> bytes:
        return hashlib.sha256(description.encode()).digest()

    return {
        task: [
            {"prompt": f"{description}. ", "completion": section}
            for description, section in sorted(
                ((d, s) for s in sections for d in sorted(by_section[s], key=order)[:most]),
                key=lambda pair: order(pair[0]),
            )
        ]
        for task, sections in TOPICS.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--list", type=Path, metavar="FILE", help="read this, not the system's")
    parser.add_argument(
        "--most", type=int, default=1000, metavar="N", help="of a section (default: %(default)s)"
    )
    given = parser.parse_args()
    try:
        text = given.list.read_text(encoding="utf-8") if given.list else available()
        found = records(text, given.most)
    except (Unreadable, OSError) as error:
        sys.exit(f"topics: {error}")
    given.out.mkdir(parents=True, exist_ok=True)
    for task, own in found.items():
        out, part = given.out / f"{task}.jsonl", given.out / f".{task}.part"
        part.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in own))
        part.replace(out)
        print(f"{out}: {len(own):,} descriptions of {', '.join(TOPICS[task])}")


if __name__ == "__main__":
    main()

"""Runs whose setting a search kept among others: which place it gave each, and what that allows.

A search that keeps several settings runs each on the same fresh seeds. Its own seed ranks them, so
the first place is a choice that these seeds know nothing of, and so is any other place. The best
*on these seeds* is best by luck as well: to report that one is what the search was there to avoid.
So runs of several places are compared place by place, all of which are shown and count for the
level; or with each other, by the key that was searched; never by picking one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.scaling.compare.question import FINALIST
from nlscale.telemetry.files import read_object, to_json
from nlscale.telemetry.files import replace as replace_file

SEARCH = "search"
"""The folder of a sweep in which its search lies."""
_FILE = "finalists.json"


@dataclass(frozen=True)
class Finalists:
    """What a search has decided."""

    key: str
    """That was searched."""
    places: Mapping[str, int]
    """From 1, by the name of a run."""

    def write(self, sweep: Path) -> None:
        """Keep them in the folder of their sweep, which `read` is given."""
        path = sweep / SEARCH / _FILE
        said = {"key": self.key, "places": dict(self.places)}
        if not path.exists() or read_object(path) != said:
            replace_file(path, (to_json(said, indent=1) + "\n").encode())

    @classmethod
    def read(cls, sweep: Path) -> Finalists | None:
        """Those of the sweep in that folder; None where no search has decided anything.

        Raises:
            UserError: the file is damaged.
        """
        path = sweep / SEARCH / _FILE
        if not path.exists():
            return None
        said = read_object(path)
        key, places = said.get("key"), said.get("places")
        if not isinstance(key, str) or not isinstance(places, dict) or not _all_counts(places):
            raise UserError(f"{path} is damaged; move it away, and run the same `nlscale sweep`")
        return cls(key, places)


def refuse_choices(
    places: Iterable[str | None], searched: Iterable[str], named: Sequence[str], picked: bool
) -> None:
    """Refuse a table in which finalists stand for each other, or one was picked.

    Args:
        places: of the runs of the table; None of one that is no finalist.
        searched: keys that the searches of these runs searched.
        named: keys that the table is of: its factors and what pairs.
        picked: whether the runs are those of one value of a searched key.

    Raises:
        UserError: the places are several, and no key that tells them apart is named.
    """
    there = sorted({place for place in places if place is not None}, key=int)
    keys = sorted(set(searched))
    if FINALIST in named or (len(there) < 2 and not picked):
        return
    if picked:
        raise UserError(
            f"--where {keys[0]} picks one of several finalists of a search, and who has seen "
            f"these seeds may pick the luckiest: {_fixes(keys)}"
        )
    if not set(keys) & set(named):
        raise UserError(
            f"these runs are finalists {', '.join(there)} of a search of {' and '.join(keys)}, and "
            f"which counts these seeds may not decide: {_fixes(keys)}"
        )


def _all_counts(places: Mapping[str, Any]) -> bool:
    return all(type(place) is int and place > 0 for place in places.values())


def _fixes(keys: Sequence[str]) -> str:
    return (
        f"--where {FINALIST}=1 takes the one that the search put first, --each {FINALIST} makes a "
        f"table of each place, --each {keys[0]} one of each value"
    )

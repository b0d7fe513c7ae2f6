"""What `nlscale data info` says of data folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlscale.config.urls import Location, is_url
from nlscale.data.index import Index, Split, read_index
from nlscale.data.look.lengths import LengthFigures
from nlscale.data.look.scan import Scan, scan_shards, together
from nlscale.data.progress import phase
from nlscale.data.shards import TokenShards
from nlscale.errors import UserError

Facts = dict[str, Any]
"""Of a folder: its index, with `directory`; of each split `shards` (their number), `size_bytes` and
`lengths` (`LengthFigures`, None where they were not read or there are none) in place of its shards.
"""


def facts_of(
    directories: Sequence[Location],
    lengths: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> list[Facts]:
    """What some folders hold, after seeing that all of their shards are there.

    Args:
        directories: made by `nlscale data build`, or URLs of such.
        lengths: whether to read all tokens, for the lengths of the documents. Behind a URL they are
            not read.
        workers: threads that read; None: as many as there are cores.
        progress: say on standard error how far it is.

    Raises:
        UserError: a folder has no index that can be used, or a shard is missing or altered.
    """
    indexes = [(directory, read_index(directory)) for directory in directories]
    for directory, index in indexes:
        for split in index["splits"]:
            # Before hours of reading: a UserError names a missing shard; behind a URL that is all
            # that verifying looks for.
            TokenShards(directory, split, verify=is_url(directory))
    workers = workers or len(os.sched_getaffinity(0))
    return [_facts(directory, index, lengths, workers, progress) for directory, index in indexes]


def _facts(directory: Location, index: Index, lengths: bool, workers: int, progress: bool) -> Facts:
    found: dict[str, LengthFigures | None] = dict.fromkeys(index["splits"])
    # Examples of a task have all one length, and separators in them.
    if lengths and "task" not in index and not is_url(directory):
        total = sum(map(size_of, index["splits"].values()))
        with phase(f"reading {directory}", total, progress, "shards") as advance:
            for name, split in index["splits"].items():
                scans = scan_shards(Path(directory), index, split["shards"], workers, advance)
                found[name] = together(map(_readable, scans)).figures()
    splits = {
        name: {**split, "shards": len(split["shards"]), "size_bytes": size_of(split)}
        | {"lengths": found[name]}
        for name, split in index["splits"].items()
    }
    return {"directory": str(directory), **index, "splits": splits}


def _readable(scan: Scan | UserError) -> Scan:
    if isinstance(scan, UserError):
        raise scan
    return scan


def size_of(split: Split) -> int:
    """Bytes of its shards."""
    return sum(shard["size_bytes"] for shard in split["shards"])

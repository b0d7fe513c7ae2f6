"""The data folder that a build writes: whose shards lie there, clearing it, and finishing it."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from nlscale.data.index import BUILDING_NAME, INDEX_NAME, SPLITS, Index, write_json
from nlscale.data.tokenizer import SETTINGS_NAME, TOKENIZER_NAME
from nlscale.data.verified import VERIFIED_NAME, remember, state_of
from nlscale.errors import UserError

_SHORT = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
"""Errors of memory, processes and open files, which are none of the disk's."""
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar")


def _shard_paths(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if _SHARD_NAME.fullmatch(path.name))


def refuse_foreign_shards(out: Path) -> None:
    """A UserError where a folder holds shards that no build has left there."""
    ours = (out / INDEX_NAME).exists() or (out / BUILDING_NAME).exists()
    paths = _shard_paths(out)
    if paths and not ours:
        raise UserError(
            f"{out} holds {paths[0].name}, which no build left there; choose another --out"
        )


def clear(out: Path) -> None:
    """Mark `out` as being built, then remove what an earlier build left, its index first."""
    out.mkdir(parents=True, exist_ok=True)
    (out / BUILDING_NAME).touch()
    for name in (INDEX_NAME, VERIFIED_NAME, TOKENIZER_NAME, SETTINGS_NAME):
        (out / name).unlink(missing_ok=True)
    remove_temporary(out)
    for path in _shard_paths(out):
        path.unlink()


def remove_temporary(out: Path) -> None:
    """Remove what a build that was killed had written a part of. Raises OSError."""
    for path in out.glob(".*.json.*.tmp"):
        path.unlink()


def finish(out: Path, index: Index) -> None:
    """Write the index of a folder whose shards are written: it is built. Raises OSError."""
    # Hashed while they were written, so that no start of a run has to read them for it.
    remember(
        out,
        {
            shard["name"]: state_of(out, shard)
            for split in index["splits"].values()
            for shard in split["shards"]
        },
    )
    write_json(out / INDEX_NAME, index)
    (out / BUILDING_NAME).unlink(missing_ok=True)


def unwritable(out: Path, error: OSError | MemoryError) -> UserError:
    """What is said where the disk does not take what is built, or the machine has no more to give.

    The same command goes on from what is finished.
    """
    if isinstance(error, MemoryError) or error.errno in _SHORT:
        why = str(error) or type(error).__name__
        return UserError(
            f"cannot build {out} here: {why}; use fewer --workers or more memory, and the same "
            "command goes on from what is finished"
        )
    return UserError(
        f"cannot write {out}: {error}; make room or choose another --out, and build again"
    )

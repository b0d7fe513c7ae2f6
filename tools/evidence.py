"""Packs the finished runs of a sweep or stream into one small file, to be shown or gone on with.

    python tools/evidence.py runs/sweeps/mixers --out docs/design/evidence/mixers.tar.xz

Of each run: its config.yaml and summary.json, its evals, and of metrics.jsonl what tables and
figures are made of: whole records of validation and evaluation, of training the loss and which
levels updated. Checkpoints stay. Unpacked where it was packed (`tar xf mixers.tar.xz` in the root
of a clone), the runs have finished: the same sweep prints their table, and runs what is missing.
The same runs give the same bytes, whenever they are packed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.evaluate.asking.kept import EVALS
from nlscale.scaling.sweep.search import DIVERGED
from nlscale.telemetry.figures import METRICS_FILE, SUMMARY_FILE, read_records
from nlscale.train.folder import CONFIG_FILE


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of the sweep, below the current one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.tar.xz")
    given = parser.parse_args(arguments)
    try:
        runs = finished(given.folder)
        pack(given.folder, runs, given.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {len(runs)} finished runs, {given.out.stat().st_size / 1024:.0f} KiB")
    return 0


def finished(folder: Path) -> list[Path]:
    """The folders of finished runs at any depth, by name.

    Raises:
        UserError: there is none, or the folder is not below the current one, so that unpacking
            would not bring it back.
    """
    if folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"{folder}: name it from the root of the clone, such as runs/sweeps/mixers")
    found = sorted(path.parent for path in folder.rglob(SUMMARY_FILE))
    if not found:
        raise UserError(f"{folder} has no run that has finished (no {SUMMARY_FILE})")
    return found


def pack(folder: Path, runs: list[Path], out: Path) -> None:
    """Write what is kept of them, and what searches know of runs that diverged, by their paths.

    Raises:
        UserError: a file is missing or damaged.
    """
    diverged = ((path, path.read_bytes()) for path in sorted(folder.rglob(DIVERGED)))
    files = list(chain(diverged, *map(kept, runs)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz") as archive:
        for path, data in files:
            entry = tarfile.TarInfo(path.as_posix())
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))


def kept(run: Path) -> Iterator[tuple[Path, bytes]]:
    """The files of a run that are packed, and what is in them.

    Raises:
        UserError: one is missing or damaged.
    """
    try:
        for path in (run / CONFIG_FILE, run / SUMMARY_FILE, *sorted((run / EVALS).glob("*.json"))):
            yield path, path.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    lines = [json.dumps(short(record)) + "\n" for record in read_records(run)]
    yield run / METRICS_FILE, "".join(lines).encode()


def short(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record what tables and figures of finished runs are made of."""
    if record.get("kind") != "train":
        return dict(record)
    levels = record.get("levels") or {}
    return {
        "kind": "train",
        "step": record["step"],
        "tokens": record["tokens"],
        "loss": record["loss"],
        "levels": {name: {"updated": level["updated"]} for name, level in levels.items()},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

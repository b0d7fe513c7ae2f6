"""A data folder for each source, in one build: what they are called, and what is in their way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nlscale.data.documents import format_of
from nlscale.data.folder import refuse_foreign_shards
from nlscale.data.formats.tokens import part_of
from nlscale.data.index import BUILDING_NAME, INDEX_NAME, UNITS_NAME
from nlscale.data.sources import STDLIB, Found, find_files
from nlscale.data.tally import shown
from nlscale.errors import UserError

_TAKEN = "slurm"
"""Beside the data folders, scripts and logs of the jobs that build them."""


def named_sources(sources: Sequence[str]) -> dict[str, str]:
    """The sources by the names of their data folders, in their order.

    A source is called by the last part of its path, a file without the suffixes of what can be
    read: `x.jsonl.zst` is `x`. Of the files of one set of tokens the first that is named counts.

    Raises:
        UserError: two are called the same, or one by what is no name of a data folder.
    """
    named: dict[str, str] = {}
    files: set[str] = set()
    for source in sources:
        path = Path(os.path.abspath(source))
        is_file = source != STDLIB and path.is_file()
        if is_file:
            path = part_of(path) or path  # a pattern of the shell names all that belong together
            if str(path) in files:
                continue
            files.add(str(path))
        name = _name(path, is_file)
        if name in named:
            raise UserError(
                f"{shown(named[name])} and {shown(source)} would both be built into a folder "
                f"called {shown(name)!r}; rename one of them, or name a link to it that is called "
                "otherwise (ln -s)"
            )
        if not name.strip(" .") or name.startswith(".") or name == _TAKEN:
            raise UserError(
                f"{shown(source)} would be built into a folder called {shown(name)!r}, which none "
                "can be; name a link to it that is called otherwise (ln -s)"
            )
        named[name] = source
    return named


def _name(path: Path, is_file: bool) -> str:
    name = path.name
    if is_file and format_of(name)[0]:
        name = Path(Path(name).stem).stem if format_of(name)[1] else Path(name).stem
    return name


def find_by_source(sources: Sequence[str], out: Path) -> dict[str, Found]:
    """What each source holds, by the name of its data folder below `out`.

    What is reached from two of them is of the first.

    Raises:
        UserError: as `named_sources` and `nlscale.data.sources.find_files`; all that a source holds
            is in others before it; or there is something else where its data are to be.
    """
    named = named_sources(sources)
    _refuse_data(out)
    for name in named:
        _refuse_others(out / name)
    founds: dict[str, Found] = {}
    before: Found | None = None
    for name, source in named.items():
        before = founds[name] = find_files([source], out, before)
        if not before.files:
            raise UserError(
                f"all that {shown(source)} holds is in the sources named before it; leave it out, "
                "or name it first"
            )
    return founds


def _refuse_data(out: Path) -> None:
    """A UserError where the folder that is to hold data folders is one itself."""
    if any((out / name).is_file() for name in (INDEX_NAME, BUILDING_NAME)):
        raise UserError(
            f"{out} is a data folder, and is to hold one of each source; choose another --out"
        )
    refuse_foreign_shards(out)


def _refuse_others(folder: Path) -> None:
    """A UserError where something lies that no such build has left, such as the source itself."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; move it, or choose another --out")
    if (folder / UNITS_NAME).exists():
        raise UserError(
            f"a build of {folder} alone is not finished; finish it, remove {folder / UNITS_NAME}, "
            "or choose another --out"
        )
    refuse_foreign_shards(folder)
    ours = any((folder / name).exists() for name in (INDEX_NAME, BUILDING_NAME))
    others = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if others and not ours:
        raise UserError(
            f"{folder} holds {shown(others[0])} and is no data folder; choose another --out"
        )

"""Finding the files of a source, and taking note of everything in it that is none."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from nlscale.data.compressed import COMPRESSED
from nlscale.data.documents import SUFFIXES, SourceFile, format_of
from nlscale.data.formats.base import NOT_TEXT
from nlscale.data.formats.tokens import part_of, parts_of
from nlscale.data.tally import Tally, shown
from nlscale.errors import UserError

STDLIB = "stdlib"
_STDLIB_LIMIT = 1 << 20  # larger files of the standard library are generated tables
_STDLIB_EXCLUDED = ("site-packages", "dist-packages", "__pycache__")
_STDLIB_SUFFIXES = (".py", ".rst", ".txt")


class Found:
    """What the sources hold.

    Fields: `files`, sorted by path within each source, a file that is reached twice only once;
    `names` of the sources by `SourceFile.group`; `judged`, which of them must be readable (the
    standard library holds broken files on purpose); `left_out`, what is not to be read, by kind;
    `left_bytes`, of what could be text among it; `lost`, files that should be read and are not
    there to be, by group; `walked` and `reached`, the real paths of folders and of files.

    Args:
        after: what other sources hold: what is in it is not found again.
    """

    def __init__(self, after: Found | None = None) -> None:
        self.files: list[SourceFile] = []
        self.names: list[str] = []
        self.judged: list[bool] = []
        self.left_out = Tally()
        self.left_bytes = 0
        self.lost: dict[int, Tally] = {}
        self.walked: set[str] = set() if after is None else after.walked
        self.reached: set[str] = set() if after is None else after.reached

    @property
    def bytes(self) -> int:
        """Of the files to read."""
        return sum(file.size for file in self.files)

    def begin(self, name: str, *, judged: bool) -> int:
        """A source begins; its group."""
        self.names.append(name)
        self.judged.append(judged)
        return len(self.names) - 1

    def leave(self, kind: str, path: str | Path, size: int = 0, why: str = "") -> None:
        """Take note of something that is left out; with a size, of what could be text."""
        self.left_out.add(kind, str(path), why, size)
        self.left_bytes += size

    def lose(self, kind: str, path: str | Path, why: str = "") -> None:
        """Take note of a file, or a folder, that cannot be got at."""
        self.lost.setdefault(len(self.names) - 1, Tally()).add(kind, str(path), why)


def find_files(
    sources: Iterable[str], out: str | Path | None = None, after: Found | None = None
) -> Found:
    """What lies in `sources`, to be read or not.

    A source is a file, a folder (searched recursively, linked folders too), or `stdlib`: the .py,
    .rst and .txt files of the running Python's standard library of up to 1 MiB. A folder that
    happens to be called stdlib is `./stdlib`. All files that are named by themselves count as one
    source: a shell makes many of one pattern.

    Args:
        out: a folder that is left out, because the data are built there
        after: what other sources hold, of which nothing is found again

    Raises:
        UserError: a missing path, a named file with an unknown suffix, and a folder without a
            file that can be read.
    """
    found, named, group = Found(after), 0, -1
    for source in sources:
        if source == STDLIB:
            found.begin(source, judged=False)
            _Walk(found, Path(sysconfig.get_path("stdlib")), None, stdlib=True).run()
        elif stat.S_ISDIR(_status(source).st_mode):
            found.begin(source, judged=True)
            _Walk(found, Path(source), out).run()
        else:
            if not named:
                group = found.begin(source, judged=True)
            named += 1
            found.files.append(_named_file(source, group))
    if named > 1:
        found.names[group] = f"the {named:,} files named"
    files, found.files = found.files, []
    for file in files:
        if (real := os.path.realpath(file.path)) not in found.reached:
            found.reached.add(real)
            found.files.append(file)
    return found


def fingerprint(files: Iterable[SourceFile], options: object) -> str:
    """A sha256 of the names, sizes and modification times of `files`, and of `options`."""
    described = [[file.name, file.size, file.mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([described, options]).encode()).hexdigest()


class _Walk:
    """One folder, and all that is below it; first without links, then what links lead to.

    So a folder that is there and linked to has its own name, and a link to what was walked
    already, as in a loop, is not followed.
    """

    def __init__(
        self, found: Found, root: Path, out: str | Path | None, *, stdlib: bool = False
    ) -> None:
        self._found = found
        self._left = Tally()
        self._root = root
        self._out = None if out is None else os.path.realpath(out)
        self._stdlib = stdlib
        self._files: list[SourceFile] = []
        self._walked = set() if stdlib else found.walked
        self._linked: list[Path] = []
        self._elsewhere = False  # whether a folder in it was found in another source

    def run(self) -> None:
        """Add to `found`. Raises UserError: there is no file that can be read."""
        if os.path.realpath(self._root) in self._walked:
            return  # all of it was found in another source
        self._folder(self._root)
        while self._linked:
            link = self._linked.pop(0)
            if os.path.realpath(link) in self._walked:
                self._leave("link to a folder that is read", link)
            else:
                self._folder(link)
        self._found.files += sorted(self._files, key=lambda file: file.name)
        if not self._files and not self._elsewhere:
            root = shown(str(self._root))
            raise UserError(f"{root} holds nothing that can be read: {self._what()}")

    def _leave(self, kind: str, path: Path, size: int = 0, why: str = "") -> None:
        self._left.add(kind, str(path), why, size)
        self._found.leave(kind, path, size, why)

    def _what(self) -> str:
        lost = self._found.lost.get(len(self._found.names) - 1)
        there = ", ".join(t.words() for t in (lost, self._left) if t and t.count)
        read = f"read are {' '.join(SUFFIXES)}, the text ones also with {' '.join(COMPRESSED)}"
        return f"it has {there}; {read}" if there else f"it is empty; {read}"

    def _folder(self, top: Path) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(folder)
            if real in self._walked:
                self._elsewhere = True
                continue
            self._walked.add(real)
            if real == self._out:
                self._leave("the folder that is built", folder)
                continue
            try:
                with os.scandir(folder) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._found.lose("unreadable folder", folder, str(error.strerror))
                continue
            for entry in inside:
                if self._entry(entry):
                    waiting.append(Path(folder, entry.name))

    def _entry(self, entry: os.DirEntry[str]) -> bool:
        """Take note of one entry; whether it is a folder to walk now."""
        path = Path(entry.path)
        if entry.name.startswith("."):
            self._leave("hidden", path)
            return False
        try:
            status = entry.stat()
        except OSError as error:
            self._missing(entry, path, error)
            return False
        if stat.S_ISDIR(status.st_mode):
            if self._stdlib and (entry.is_symlink() or entry.name in _STDLIB_EXCLUDED):
                return False
            if entry.is_symlink():
                self._linked.append(path)
                return False
            return True
        if stat.S_ISREG(status.st_mode):
            self._file(path, status)
        else:
            self._leave("pipe, socket or device", path)
        return False

    def _missing(self, entry: os.DirEntry[str], path: Path, error: OSError) -> None:
        kind = "link that leads nowhere" if entry.is_symlink() else "unreadable"
        if format_of(entry.name)[0] and parts_of(path) is not None:
            self._found.lose(kind, path, str(error.strerror))
        else:
            self._leave(kind, path, why=str(error.strerror))

    def _file(self, path: Path, status: os.stat_result) -> None:
        if self._stdlib and path.suffix not in _STDLIB_SUFFIXES:
            self._leave(_suffix(path), path)
        elif self._stdlib and status.st_size > _STDLIB_LIMIT:
            self._leave("over 1 MiB in the standard library", path)
        elif part_of(path) is not None:
            return  # of another file, with which it is read or left out
        elif not format_of(path.name)[0] or (parts := parts_of(path)) is None:
            kind = _suffix(path)
            self._leave(kind, path, 0 if kind in NOT_TEXT else status.st_size)
        else:
            name = path.relative_to(self._root).as_posix()
            self._files.append(_file(parts, name, len(self._found.names) - 1))


def _named_file(source: str, group: int) -> SourceFile:
    path, status = Path(source), _status(source)
    path = part_of(path) or path  # a pattern of the shell names all that belong together
    if not format_of(path.name)[0]:
        raise UserError(
            f"cannot read {shown(source)}: its suffix is none of {' '.join(SUFFIXES)} "
            f"(the text ones also with {' '.join(COMPRESSED)})"
        )
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"cannot read {shown(source)}: it is a pipe, a socket or a device, and text is read "
            "twice; write it to a file"
        )
    parts = parts_of(path)
    if parts is None:
        raise UserError(
            f"cannot read {shown(source)}: of its suffix are tokens, and the index that says where "
            f"their documents end is not beside it; a .bin has an .idx, and a .ds a .ds.index"
        )
    return _file(parts, path.name, group)


def _file(parts: list[Path], name: str, group: int) -> SourceFile:
    """A file, the first of those that belong to it."""
    statuses = [os.stat(path) for path in parts]
    size = sum(status.st_size for status in statuses)
    return SourceFile(parts[0], name, size, max(s.st_mtime_ns for s in statuses), group)


def _status(source: str) -> os.stat_result:
    what = f"no source at {shown(source) if source.strip() else repr(source)}"
    try:
        if source.strip():
            return os.stat(source)
        reason = "it is empty; is a variable unset?"
    except FileNotFoundError:
        reason = "it is a link that leads nowhere" if os.path.islink(source) else ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{what}{f' ({reason})' if reason else ''}; name a file, a folder, or {STDLIB}")


def _suffix(path: Path) -> str:
    """What a file that is left out is counted as: its suffix, the two of a compressed one."""
    packed = format_of(path.name)[1]
    suffix = Path(path.stem).suffix.lower() + packed if packed else path.suffix.lower()
    return suffix or "no suffix"

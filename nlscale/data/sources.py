"""Where text comes from: finding the files of a source, and reading their documents."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from nlscale.errors import UserError

STDLIB = "stdlib"
PLAIN = (".txt", ".rst", ".md", ".py")  # one file is one document
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
_STDLIB_LIMIT = 1 << 20  # larger files of the standard library are generated tables
_STDLIB_EXCLUDED = ("site-packages", "dist-packages", "__pycache__")


class SourceFile(NamedTuple):
    """A file to read: `name` is its path within the source, `size` is in bytes."""

    path: Path
    name: str
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """A document, or what stands in its place when it cannot be read (`error` is not empty).

    `text` and `data` are the same text as str and as UTF-8. `consumed` is about how many bytes
    of the source file it took; over a file they add up to its size.
    """

    name: str
    text: str
    data: bytes
    consumed: int
    error: str = ""


def find_files(sources: Iterable[str]) -> list[SourceFile]:
    """The files of `sources`, sorted by path within each source; a file reached twice counts once.

    A source is a file, a folder (searched recursively, hidden entries and unknown suffixes
    ignored), or `stdlib`: the .py, .rst and .txt files of the running Python's standard library
    of up to 1 MiB. A folder that happens to be called stdlib is `./stdlib`.

    Raises:
        UserError: a missing path and for a file with an unknown suffix.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        for file in _stdlib_files() if source == STDLIB else _path_files(Path(source)):
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def fingerprint(files: Iterable[SourceFile], options: object) -> str:
    """A sha256 of the names, sizes and modification times of `files`, and of `options`."""
    described = [[file.name, file.size, file.mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([described, options]).encode()).hexdigest()


def read_documents(files: Iterable[SourceFile]) -> Iterator[Document]:
    """All documents of `files`, in order, those that cannot be read among them."""
    for file in files:
        try:
            if file.path.suffix.lower() == ".jsonl":
                yield from _read_jsonl(file)
            elif file.path.suffix.lower() == ".parquet":
                yield from _read_parquet(file)
            else:
                yield _decoded(str(file.path), file.path.read_bytes(), file.size)
        except (OSError, pyarrow.ArrowException) as error:
            yield _failed(str(file.path), 0, error)


def _path_files(root: Path) -> list[SourceFile]:
    if root.is_dir():
        return [file for file in _walk(root) if file.path.suffix.lower() in SUFFIXES]
    if not root.exists():
        raise UserError(f"no source at {root}; name a file, a folder, or {STDLIB}")
    if root.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot read {root}: its suffix is none of {' '.join(SUFFIXES)}")
    stat = root.stat()
    return [SourceFile(root, root.name, stat.st_size, stat.st_mtime_ns)]


def _stdlib_files() -> list[SourceFile]:
    return [
        file
        for file in _walk(Path(sysconfig.get_path("stdlib")), _STDLIB_EXCLUDED)
        if file.path.suffix in (".py", ".rst", ".txt") and file.size <= _STDLIB_LIMIT
    ]


def _walk(root: Path, excluded: tuple[str, ...] = ()) -> list[SourceFile]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():  # a dangling link, a socket
                continue
            stat = path.stat()
            relative = path.relative_to(root).as_posix()
            files.append(SourceFile(path, relative, stat.st_size, stat.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


def _read_jsonl(file: SourceFile) -> Iterator[Document]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{file.path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _failed(name, len(line), error)
                continue
            text = record.get("text") if isinstance(record, dict) else None
            yield _checked(name, text, len(line))


def _read_parquet(file: SourceFile) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(file.path) as table:
        if "text" not in table.schema_arrow.names:
            yield _failed(str(file.path), file.size, "no column 'text'")
            return
        row, each = 0, file.size // max(1, table.metadata.num_rows)
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(1024, row_groups=[group], columns=["text"]):
                for value in batch.column(0):
                    name = f"{file.path}:{row}"
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        yield _failed(name, each, error)
                        continue
                    yield _checked(name, text, each)


def _decoded(name: str, data: bytes, consumed: int) -> Document:
    try:
        return Document(name, data.decode("utf-8"), data, consumed)
    except UnicodeDecodeError as error:
        return _failed(name, consumed, error)


def _checked(name: str, text: object, consumed: int) -> Document:
    if not isinstance(text, str):
        return _failed(name, consumed, "its 'text' is missing or not a string")
    try:
        return Document(name, text, text.encode("utf-8"), consumed)
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        return _failed(name, consumed, error)


def _failed(name: str, consumed: int, error: object) -> Document:
    if isinstance(error, UnicodeError):
        error = f"not UTF-8 ({error})"
    return Document(name, "", b"", consumed, str(error))

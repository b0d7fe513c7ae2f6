"""The files a run writes as it goes: whole lines or nothing, and always valid JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.telemetry.records import parse

_TAIL_BYTES = 1 << 20  # far longer than any line of ours


class LineFile:
    """An append-only text file; each line is one write, at once in the hands of the system.

    A line cut short by a full disk is taken back, and one cut short by a kill is dropped when
    the file is opened again, so every line read is a whole one.

    Raises:
        UserError: on opening or appending, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            torn = _drop_torn_tail(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._torn = b"" if torn.startswith(b"{") else torn
        """What stood at the end and is no record that a kill has cut short."""

    def append(self, line: str) -> None:
        """Write `line` and a newline."""
        data = (line + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        reason = "only a part of the line fitted"
        try:
            if self._file.write(data) == len(data):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        with contextlib.suppress(OSError):
            self._file.truncate(size)
        raise UserError(f"cannot append to {self._path}: {reason}; mend that and resume the run")

    def records(self) -> list[dict[str, Any]]:
        """The records among the lines (see `nlscale.telemetry.records.parse`)."""
        return [record for _, record in self._lines() if record is not None]

    def keep(
        self, wanted: Callable[[dict[str, Any]], bool], aside: Path
    ) -> tuple[list[dict[str, Any]], int]:
        """Keep only the records that are `wanted`, atomically; the others go to another file.

        They are on the disk there before they go here: a kill in between leaves them in both.

        Args:
            wanted: of a record.
            aside: the file that takes the lines that go, at its end.

        Returns:
            The records that went, and how many lines went besides because they were no records.

        Raises:
            UserError: one of the files cannot be written; no line is lost.
        """
        kept: list[bytes] = []
        going = [_unreadable(self._torn)] if self._torn else []
        gone: list[dict[str, Any]] = []
        for line, record in self._lines():
            if record is not None and wanted(record):
                kept.append(line)
                continue
            if record is not None:
                gone.append(record)
            going.append(line if record is not None else _unreadable(line))
        if going:
            _append_all(aside, going)
            replace(self._path, b"".join(line + b"\n" for line in kept))
            self._file.close()
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            self._torn = b""
        return gone, len(going) - len(gone)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Each line without its end, and the record that it is."""
        for line in self._path.read_bytes().split(b"\n")[:-1]:
            try:
                yield line, parse(line)
            except ValueError:
                yield line, None

    def close(self) -> None:
        """Close the file; twice does no harm."""
        self._file.close()


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """`record` as JSON that every reader accepts.

    A float that is NaN or infinite becomes null, and its dotted key is listed under "not_finite".
    numpy and torch scalars become numbers, paths become strings.
    """
    lost: list[str] = []
    plain = _plain(record, "", lost)
    if lost:
        plain["not_finite"] = lost
    return json.dumps(plain, indent=indent, allow_nan=False)


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path`: readers see the old file or the new one, whole.

    Raises:
        UserError: the file cannot be written; the old one is untouched.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run, such as summary.json.

    Raises:
        UserError: the file is missing, or holds something else, or nothing.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split()) if path.stat().st_size else "it is empty"
        raise UserError(f"{path} is damaged: {what}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def _plain(value: Any, key: str, lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {str(k): _plain(v, f"{prefix}{k}", lost) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}.{i}", lost) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(key)
        return None
    return value


def _unreadable(line: bytes) -> bytes:
    text = line.decode("utf-8", "backslashreplace")
    return json.dumps({"kind": "unreadable", "line": text}).encode()


def _append_all(path: Path, lines: list[bytes]) -> None:
    """Append lines, on the disk on return, or none of them. Raises UserError."""
    try:
        with open(path, "ab") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                torn = size > 0 and not _ends_a_line(path)
                file.write(b"\n" * torn + b"".join(line + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise UserError(f"cannot append to {path}: {error.strerror}") from None


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _drop_torn_tail(path: Path) -> bytes:
    """Cut off what follows the last end of a line; returns it."""
    size = path.stat().st_size
    position, tail = size, b""
    with open(path, "rb") as file:
        while position and b"\n" not in tail:
            begin = max(0, position - _TAIL_BYTES)
            file.seek(begin)
            tail = file.read(position - begin) + tail
            position = begin
    torn = tail[tail.rfind(b"\n") + 1 :]
    if torn:
        os.truncate(path, size - len(torn))
    return torn

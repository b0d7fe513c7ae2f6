"""The files a run writes as it goes: whole lines or nothing, and always valid JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nlscale.errors import UserError


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
            _drop_torn_tail(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

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
        """The JSON lines."""
        return [json.loads(line) for line in self._path.read_bytes().splitlines()]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Keep only the JSON lines that are `wanted`, atomically; returns those that went."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if wanted(json.loads(line))]
        gone = [record for record in map(json.loads, lines) if not wanted(record)]
        if gone:
            replace(self._path, b"".join(kept))
            self._file.close()
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        return gone

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


def _drop_torn_tail(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = max(0, size - 2**20)  # far longer than any line of ours
        file.seek(start)
        tail = file.read() if size else b""
    if tail and not tail.endswith(b"\n"):
        os.truncate(path, start + tail.rfind(b"\n") + 1)

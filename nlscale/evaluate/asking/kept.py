"""Results that are kept, by what was asked of which model. No torch is imported.

    RUN/evals/loss-step400-3f2a9c01b7d4.json          a result
    RUN/evals/loss-step400-3f2a9c01b7d4.parts.jsonl   parts of one that is not finished

The digits are a hash of the checkpoint, the options, what the files hold that they name, the data
that the model was trained on with their tokenizer, and the version of nlscale. So a question that
was answered before is not asked again, one that was cut off goes on, and another checkpoint,
another text or another option is another question.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nlscale import __version__
from nlscale.checkpoint import FOLDER
from nlscale.config.data_sources import folders_of
from nlscale.config.urls import Location, is_url, location_of
from nlscale.data.index import INDEX_NAME, read_index
from nlscale.data.tasks.table import task_of_index
from nlscale.data.tokenizer import SETTINGS_NAME, TOKENIZER_NAME
from nlscale.errors import UserError
from nlscale.telemetry.files import LineFile, read_object, replace, to_json

EVALS = "evals"
"""In the folder of a run or of an export."""
_FORM = 1
"""Of results; one that reads otherwise is not found again."""
_MANIFEST, _STATE = "manifest.json", "state.json"  # of a checkpoint
_RUN_CONFIG, _EXPORT_CONFIG = "config.yaml", "config.json"
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
_CHUNK = 1 << 20


class Kept:
    """The file of one result, and of its parts.

    Args:
        folder: where they lie; it is made when something is written. None: nothing is kept.
        stem: of their names.
    """

    def __init__(self, folder: Path | None, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._lines: LineFile | None = None

    @property
    def path(self) -> Path | None:
        """Of the result."""
        return self._folder / f"{self._stem}.json" if self._folder else None

    def result(self) -> dict[str, Any] | None:
        """The result, if it is there.

        Raises:
            UserError: the file is damaged.
        """
        return read_object(self.path) if self.path and self.path.exists() else None

    def parts(self) -> dict[str, Any]:
        """What is there of one that is not finished, by the names of its parts."""
        if self._folder is None or not self._parts.exists():
            return {}
        records = self._opened().records()
        return {record["part"]: record["found"] for record in records if "part" in record}

    def add(self, part: str, found: Any) -> None:
        """Keep a part. Raises UserError: the folder cannot be written."""
        if self._folder is not None:
            self._opened().append(to_json({"kind": "part", "part": part, "found": found}))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep the result, and its parts no longer. Raises UserError: it cannot be written."""
        if self.path is None:
            return
        self.make()
        replace(self.path, (to_json(result, indent=1) + "\n").encode())
        if self._lines is not None:
            self._lines.close()
        self._parts.unlink(missing_ok=True)

    def make(self) -> None:
        """Make the folder. Raises UserError: it cannot be written."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}, where results are kept: {error.strerror}; name "
                f"another folder with --cache DIR"
            ) from None

    @property
    def _parts(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._stem}.parts.jsonl"

    def _opened(self) -> LineFile:
        if self._lines is None:
            self.make()
            self._lines = LineFile(self._parts)
        return self._lines


def home_of(folder: Path) -> Path:
    """Where the results of a model are kept: in its run's folder, else in that of its files.

    Never in the folder of a checkpoint, which holds what its manifest lists and nothing else: those
    of one that is in no run lie beside it.

    Args:
        folder: of a run, of one or all of its checkpoints, or of an export.
    """
    folder = folder.resolve()
    for inside in (folder, folder.parent):
        if inside.name == FOLDER and (inside.parent / _RUN_CONFIG).is_file():
            return inside.parent / EVALS
    if (folder / _MANIFEST).is_file():
        return folder.with_name(f"{folder.name}.{EVALS}")
    return folder / EVALS


class Named(NamedTuple):
    """The model that a folder holds, as far as its files say without being verified."""

    step: int | None
    digest: str
    data: Location | None
    """The data folder that it was trained on, which may not be there any more."""


def named(folder: Path, step: int | None = None) -> Named:
    """See `Named`; of an empty folder, too: what is wrong with it says who loads the model.

    Args:
        folder: of a run, a checkpoint, or an export.
        step: of which checkpoint of a run; None: the newest.
    """
    if (folder / _MANIFEST).is_file():
        return _checkpoint(folder)
    inside = folder / FOLDER
    found: dict[int, Path] = {}
    for path in sorted((inside if inside.is_dir() else folder).glob("step-*")):
        match = _STEP.fullmatch(path.name)
        if match and (path / _MANIFEST).is_file():
            found.setdefault(int(match[1]), path)  # one set aside only where no other is there
    if found:
        return _checkpoint(found[step if step in found else max(found)])
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        hashed.update(f"{path.name} {_digest(path)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):  # too large to read for it
        status = path.stat()
        hashed.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    described = _object(folder / _EXPORT_CONFIG)
    return Named(described.get("step"), hashed.hexdigest(), _data(described.get("nlscale")))


def _checkpoint(folder: Path) -> Named:
    match, state = _STEP.fullmatch(folder.resolve().name), _object(folder / _STATE)
    step = int(match[1]) if match else None
    return Named(step, _digest(folder / _MANIFEST), _data(state.get("config")))


def _data(config: Any) -> Location | None:
    folders = folders_of(config.get("data") if isinstance(config, dict) else None)
    folder = folders[0] if len(folders) == 1 else None  # of several one has to be named
    return location_of(folder) if isinstance(folder, str) and folder else None


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def stem(name: str, model: Named, options: Mapping[str, Any]) -> str:
    """What the files of a result are called.

    Args:
        name: of the evaluation.
        model: which is asked.
        options: what was asked for. Paths stand for what they hold.
    """
    of = [_FORM, __version__, name, model.digest, contents(options), _of_data(model.data)]
    step = "" if model.step is None else f"step{model.step}-"
    return f"{name}-{step}{digest_of(of)[:12]}"


def contents(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the order of their names; paths as what they hold."""
    return {key: _content(value) for key, value in sorted(options.items())}


def digest_of(value: Any) -> str:
    """A hash, in hex, of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def _of_data(folder: Location | None) -> Any:
    """What is in a data folder, and in what the task reads that it was made of."""
    if folder is None:
        return None
    index: Any = folder
    try:
        index = read_index(folder)
        beside = task_of_index(index, folder).reads
    except UserError:  # text; or it is not there, which says who needs it
        beside = ()
    # behind a URL the index stands for all: it has hashes of the shards
    return [index if is_url(folder) else _content(folder), *map(_content, beside)]


def _content(value: Any) -> Any:
    """A value; a path as what is in the file, or the folder."""
    if not isinstance(value, Path):
        return value
    if value.name == TOKENIZER_NAME:
        return _of_tokenizer(value.parent)
    if value.is_file():
        return _digest(value)
    if (value / INDEX_NAME).is_file():  # which has hashes of the shards
        return [_digest(value / INDEX_NAME), _of_tokenizer(value)]
    if not value.is_dir():
        return str(value)
    inside = sorted(path for path in value.rglob("*") if path.is_file())
    return [[str(path.relative_to(value)), _digest(path)] for path in inside]


def _of_tokenizer(folder: Path) -> list[str | None]:
    """Of its file, and of what is said beside it of which token ends a text."""
    files = (folder / TOKENIZER_NAME, folder / SETTINGS_NAME)
    return [_digest(file) if file.is_file() else None for file in files]


def _digest(path: Path) -> str:
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return hashed.hexdigest()

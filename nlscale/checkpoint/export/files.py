"""The files of an export, opened without trusting them: JSON and safetensors hold data only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nlscale.errors import UserError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an export.

    Raises:
        UserError: it is missing, or not that.
    """
    try:
        content = json.loads(_regular(path).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no {path.name} in {path.parent}: give a folder written by nlscale checkpoint export"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; export again")
    return content


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """The tensors of an export by name, as slices that read only what is asked of them.

    Raises:
        UserError: a file is missing or not a safetensors file.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{path} is missing; copy or export all files again") from None
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} is not a safetensors file: {_suspect(path, error)}"
                ) from None
            for name in file.keys():  # noqa: SIM118
                if name in tensors:  # which of the two is meant, nobody can know
                    raise UserError(f"{path} holds {name}, and so does another file; export again")
                tensors[name] = file.get_slice(name)
        yield tensors


def _files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return [_regular(single)]
    if not index.exists():
        raise UserError(
            f"no {SINGLE_FILE} and no {INDEX_FILE} in {folder}: give a folder written by nlscale "
            f"checkpoint export; pickles (.bin, .pt) are not read, they can run code"
        )
    where = read_json(index).get("weight_map")
    names: set[str] = set()
    for name in where.values() if isinstance(where, dict) else [None]:
        # whoever wrote the index does not choose what else is opened
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(f"{index} names {name!r}, not a safetensors file beside it")
        names.add(name)
    return [_regular(folder / name) for name in sorted(names)]


def _regular(path: Path) -> Path:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a file; copy or export it again")
    return path


def _suspect(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as denied:
        return str(denied)
    if start[:1] == b"\x80" or start == b"PK\x03\x04":
        return "it looks like a pickle, which can run code; nothing of it was read"
    return f"{error}; copy or export it again"

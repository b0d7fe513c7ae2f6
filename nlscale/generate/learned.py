"""What levels have learned from a stream that goes on, kept in a file to go on from.

The file is safetensors: the tensors of a `LearningStream`, and as metadata of what model and by
what keys. Nothing that is read from it is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nlscale.config.fields import path_of
from nlscale.config.in_context import InContext, in_context, learning
from nlscale.config.vocabulary import ContextObjective, ContextReset
from nlscale.errors import UserError
from nlscale.generate.learning import LearningStream
from nlscale.generate.model import Model
from nlscale.generate.state_file import digest

_FORMAT = "nlscale learned 1"


def save(path: str | Path, model: Model, stream: LearningStream) -> None:
    """Write it; the file is the old one or the new one, whole.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(path)
    partial = path.with_name(f".partial-{path.name}")
    tensors = {name: x.cpu() for name, x in stream.tensors().items()}
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT, **_facts(model, stream)})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path, model: Model, stream: LearningStream) -> None:
    """Have a stream go on from a file.

    Raises:
        UserError: it cannot be read, or is of another model, other keys or another batch.
    """
    path = path_of(path)
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not what levels have learned: {error}") from None
    if said.get("format") != _FORMAT:
        raise UserError(f"{path} is not what levels have learned; name another file")
    for what, own in _facts(model, stream).items():
        if said.get(what) != own:
            raise UserError(
                f"{path} was learned with another {what} ({said.get(what)}, and here it is {own}); "
                f"go on with the same, or name another file"
            )
    stream.restore(tensors)


def levels_of(model: Model, overrides: Sequence[str] | None, file: Path | None) -> list[InContext]:
    """The levels that learn from what they read; none: the model reads as it is.

    Args:
        model: whose levels of objective `ntp` do.
        overrides: keys of them, and of others beside them (`nlscale.config.in_context.learning`).
        file: where what they have learned is to be kept; None: nowhere.

    Raises:
        UserError: keys that do not fit the model; a file, where nothing is kept.
    """
    levels = in_context(model.config, ContextObjective.ntp)
    if overrides:
        levels = learning(model.config, overrides)
    if file is not None and all(x.keys.reset == ContextReset.sequence for x in levels):
        raise UserError(
            f"--learned {file}: no level keeps what it has learned from one context to the next; "
            f"give --context LEVEL.reset=never beside its other keys"
        )
    return levels


def keys_of(stream: LearningStream) -> str:
    """What its levels learn by, as JSON."""
    return json.dumps(
        [[each.level, list(each.depths), asdict(each.keys)] for each in stream.levels]
    )


def _facts(model: Model, stream: LearningStream) -> dict[str, str]:
    return {"model": digest(model), "context": keys_of(stream), "dtype": str(model.dtype)}

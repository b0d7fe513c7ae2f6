"""A trained model from what a run or an export has left on the disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nlscale.checkpoint import FOLDER
from nlscale.checkpoint.export.files import CONFIG_FILE, read_json
from nlscale.checkpoint.export.weights import config_of, describe, empty_model, load_model
from nlscale.checkpoint.store import manifest
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.config.fields import path_of
from nlscale.config.vocabulary import Config, Dtype
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError
from nlscale.generate.model import Model
from nlscale.model.decoder import Decoder
from nlscale.parallel.alone import alone

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_WEIGHTS = "weights/"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """See `nlscale.load`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"nlscale.load is for one process, and this is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; load before the ranks meet, or in a process of its own"
        )
    if dtype not in (None, *_DTYPES):
        raise UserError(f"dtype {dtype} is none of {', '.join(map(str, _DTYPES))}")
    folder, place = path_of(path), _device(device)
    said: list[str] = []
    with alone():
        if (folder / CONFIG_FILE).is_file():
            described = read_json(folder / CONFIG_FILE)
            config, decoder = config_of(described, folder), load_model(folder, dtype)
        else:
            checkpoint = _checkpoint(folder, said)
            described, config, decoder = _read(checkpoint, dtype)
    for line in said:
        warnings.warn(line, stacklevel=3)  # where `nlscale.load` was called
    beside = folder if (folder / TOKENIZER_NAME).is_file() else None
    return Model(decoder.to(place), config, described.get("step", 0), beside)


def _device(given: str | torch.device | None) -> torch.device:
    gpu = torch.cuda.is_available()
    device = torch.device(given if given is not None else "cuda" if gpu else "cpu")
    if device.type == "cuda" and not gpu:
        raise UserError(f"device {device}: torch finds no GPU here; give device='cpu'")
    return device


def _checkpoint(folder: Path, said: list[str]) -> Checkpoint:
    """The checkpoint that a folder is, or the newest whole one in it, verified.

    Args:
        folder: of a checkpoint, of several, or of a run.
        said: takes a line on each broken one that is passed over.
    """
    if (folder / manifest.NAME).is_file():
        checkpoint = Checkpoint(folder, Checkpoint(folder, 0).manifest["step"])
        checkpoint.verify()
        return checkpoint
    inside = folder / FOLDER
    found = Store(inside if inside.is_dir() else folder).newest_valid(said.append)
    if found is None:
        raise UserError(
            f"{folder} holds no finished checkpoint; give the folder of a run that was trained "
            f"with checkpoint.every, a checkpoint, or what `nlscale checkpoint export` wrote"
        )
    return found


def _read(
    checkpoint: Checkpoint, dtype: torch.dtype | None
) -> tuple[dict[str, Any], Config, Decoder]:
    """What it is described by, its configuration for one process, and its model on the CPU."""
    try:
        described = describe(checkpoint, Dtype(checkpoint.state["config"]["train"]["dtype"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} is damaged: {error} in its state.json") from None
    config = config_of(described, checkpoint.path)
    decoder, pieces = empty_model(config, dtype)
    stored = {name for name in checkpoint.tensors() if name.startswith(_WEIGHTS)}
    unlike = stored ^ {piece.name for piece in pieces}
    if unlike:
        raise UserError(
            f"{checkpoint.path} and the model of its configuration differ in {len(unlike)} "
            f"weights, such as {min(unlike).removeprefix(_WEIGHTS)}: it was saved by another "
            f"version of nlscale, or of the package that its mixer is from"
        )
    checkpoint.read(pieces)
    return described, config, decoder

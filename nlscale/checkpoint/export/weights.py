"""The weights of a checkpoint as safetensors files, whole and under plain names, and back.

The files are laid out as Hugging Face lays them out: `model.safetensors`, or several files with
`model.safetensors.index.json`, and `config.json` beside them. Nothing that is read is run: JSON and
safetensors hold data only, and a pickle under another name is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from nlscale.checkpoint.export import NO_DATA
from nlscale.checkpoint.export.class_keys import check_class_keys
from nlscale.checkpoint.export.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, opened, read_json
from nlscale.checkpoint.export.origin import ORIGIN, origin_of
from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config import recipe, trees
from nlscale.config.vocabulary import Config, Dtype
from nlscale.errors import UserError
from nlscale.model.decoder import Decoder
from nlscale.model.layers import megatron_config

MAX_FILE_BYTES = 5 * 10**9
_WEIGHTS = "weights/"
_TORCH = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}
_NAMES_SHOWN = 3
_MODEL_TYPE = "hope"
HUGGING_FACE = "nlscale"
"""The model_type by which transformers finds its class."""
_MODEL_TYPES = (_MODEL_TYPE, HUGGING_FACE)
_READ_AS_FP32 = ("float16", "float64")
"""What transformers saves weights in beside, and no run is of."""
_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    files: list[str]
    """Of weights."""
    tensors: int
    parameters: int
    bytes: int
    """Of weights."""
    dtype: Dtype


def default_folder(checkpoint: Checkpoint) -> Path:
    """`export-step-N` in the run's folder, beside the folder of its checkpoints."""
    store = checkpoint.path.absolute().parent
    return store.parent / f"export-step-{checkpoint.step}"


def export(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: Dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    write_beside: Callable[[Path], None] | None = None,
) -> Exported:
    """Verify a checkpoint and write its weights and `config.json` to a new folder, all or nothing.

    Memory: one file of weights, which safetensors may copy once.

    Args:
        checkpoint: of any layout.
        folder: must not exist.
        dtype: of the weights; None: that in which the model was trained (`train.dtype`).
        max_file_bytes: size of a file, in bytes of weights; a tensor larger than that has a file
            of its own.
        write_beside: writes `config.json`, and what else belongs beside the weights, into the
            folder while that has another name; None: `config.json` alone.

    Raises:
        UserError: the folder exists or cannot be written.
        CheckpointError: the checkpoint is broken.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or give another folder with --out")
    checkpoint.verify()
    dtype = dtype or _trained_in(checkpoint)
    shapes = _weights(checkpoint)

    def read(name: str) -> torch.Tensor:
        return _read(checkpoint, name, shapes[name], dtype)

    def describe_it(partial: Path) -> None:
        write_json(partial / CONFIG_FILE, describe(checkpoint, dtype))

    return write_folder(folder, shapes, dtype, read, write_beside or describe_it, max_file_bytes)


def write_folder(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: Dtype,
    read: Callable[[str], torch.Tensor],
    write_beside: Callable[[Path], None],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write tensors as safetensors files to a new folder, and what belongs beside them, all or
    nothing.

    Args:
        folder: must not exist.
        shapes: by the name of the tensor, in the order of the files.
        dtype: of all of them.
        read: makes one, by its name.
        write_beside: writes the other files into the folder while that has another name.
        max_file_bytes: as of `export`.

    Raises:
        UserError: it cannot be written.
    """
    sizes = {name: _TORCH[dtype].itemsize * _count(shape) for name, shape in shapes.items()}
    parts = _divide(sizes, max_file_bytes)
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        for file, names in parts.items():
            tensors = {name: read(name) for name in names}
            save_file(tensors, partial / file, metadata={"format": "pt"})
            del tensors  # before the next file's are read
        if len(parts) > 1:
            where = {name: file for file, names in parts.items() for name in sorted(names)}
            total = {"total_size": sum(sizes.values())}
            write_json(partial / INDEX_FILE, {"metadata": total, "weight_map": where})
        write_beside(partial)
        for path in partial.iterdir():
            _finish(path)
        files.sync_folder(partial)
        partial.rename(folder)
        files.sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {folder}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(map(_count, shapes.values()))
    return Exported(folder, list(parts), len(shapes), parameters, sum(sizes.values()), dtype)


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Decoder:
    """The exported model on the CPU, in the dtype in which it was exported unless one is given.

    Call it, and use the model, inside `nlscale.parallel.layout.process_groups` of one rank, or
    inside `nlscale.parallel.alone.alone`.

    Raises:
        UserError: the folder is not an export, is damaged, or its weights do not fit its
            `config.json`; or there are no process groups.
    """
    if not dist.is_initialized():
        raise UserError("load_model needs nlscale.parallel.layout.process_groups of one rank")
    model, pieces = empty_model(read_config(folder), dtype)
    read_weights(folder, pieces, {p.name.removeprefix(_WEIGHTS): p.shape for p in pieces})
    return model


def empty_model(config: Config, dtype: torch.dtype | None) -> tuple[Decoder, list[Piece]]:
    """A whole model on the CPU whose weights are yet to be read, and what to read them into.

    Args:
        config: of one rank, with `model.vocabulary` set.
        dtype: of the weights; None: `train.dtype`.
    """
    assert config.model.vocabulary is not None
    model = Decoder(config, megatron_config(config), config.model.vocabulary).to(dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return model, [
        Piece(_WEIGHTS + name, tuple(p.shape), (0,) * p.dim(), p) for name, p in weights.items()
    ]


def read_config(folder: Path) -> Config:
    """The configuration of an exported model, for one process; see `config_of`.

    Raises:
        UserError: there is no `config.json`, or it is not one that `nlscale checkpoint export`
            writes.
    """
    path = folder / CONFIG_FILE
    return config_of(read_json(path), path)


def config_of(described: dict[str, Any], where: Path) -> Config:
    """The configuration of a model for one process: its `model`, `levels`, `data` and dtype.

    What says how it was trained (optimizer, batch, layout of ranks) has its defaults; all of it is
    in `described` under "nlscale". What that names is not imported.

    Args:
        described: by `describe`.
        where: it is from, for messages.

    Raises:
        UserError: `described` is damaged, or of a mixer that this process knows nothing of.
    """
    own = described.get("nlscale")
    if described.get("model_type") not in _MODEL_TYPES or not isinstance(own, dict):
        raise UserError(f"{where} is not of a model exported by nlscale checkpoint export")
    dtypes = {_hugging_face(dtype): dtype.value for dtype in Dtype}
    dtypes |= dict.fromkeys(_READ_AS_FP32, Dtype.fp32.value)
    try:
        sections = {key: own[key] for key in ("model", "levels")}
        sections["data"] = own.get("data") or {"dir": NO_DATA}
        sections["train"] = {"dtype": dtypes[described[_dtype_key(described)]]}
        of_class = described["model_type"] == HUGGING_FACE
        # transformers may have given it tokens more: resize_token_embeddings
        vocabulary = int(described["vocab_size"] if of_class else own["model"]["vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: {error} is missing or wrong; export again") from None
    overrides = [f"{key}={trees.dump(value)}" for key, value in sections.items()]
    try:
        config = recipe.load(None, overrides).config
    except UserError as error:
        reason = str(error).replace(" (the command line)", "")
        run = own.get("run")
        imports = run.get("imports") if isinstance(run, dict) else None
        named = f" (it was trained with run.imports={imports!r})" if imports else ""
        raise UserError(
            f"{where} is of another version of nlscale, or needs a package that adds to it{named}; "
            f"import that first: {reason}"
        ) from None
    config.model.vocabulary = vocabulary
    if of_class:
        check_class_keys(described, config, where)
    return config


def read_weights(folder: Path, pieces: list[Piece], expected: dict[str, tuple[int, ...]]) -> None:
    """Fill boxes of weights from an export; each rank reads only the boxes that it gives.

    Args:
        folder: with `model.safetensors`, or its index and the files that it names.
        pieces: boxes of tensors named `weights/NAME`, filled in place, converted to their dtype;
            pieces of other names are left alone.
        expected: all parameters of the whole model, with their full shapes.

    Raises:
        UserError: names that are missing or unexpected, shapes that differ, files that are missing
            or not safetensors. Nothing has been filled then.
    """
    with opened(folder) as tensors:
        _check_fit(folder, tensors, expected)
        for piece in pieces:
            if not piece.name.startswith(_WEIGHTS):
                continue
            name = piece.name.removeprefix(_WEIGHTS)
            ends = zip(piece.offsets, piece.data.shape, strict=True)
            box = tensors[name][tuple(slice(start, start + size) for start, size in ends)]
            piece.data.copy_(box)


def _weights(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Full shapes by parameter name, in the order of the model's blocks."""
    shapes = {
        name.removeprefix(_WEIGHTS): tuple(info.shape)
        for name, info in checkpoint.tensors().items()
        if name.startswith(_WEIGHTS)
    }
    # block 10 after block 9
    return {name: shapes[name] for name in sorted(shapes, key=_numbers_by_value)}


def _numbers_by_value(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _divide(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Which tensors go into which file: in order, each file as full as the limit lets it be."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)
    }


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: Dtype) -> torch.Tensor:
    full = torch.empty(shape, dtype=_TORCH[dtype])
    checkpoint.read([Piece(_WEIGHTS + name, shape, (0,) * len(shape), full)])
    return full


def describe(checkpoint: Checkpoint, dtype: Dtype | None) -> dict[str, Any]:
    """What `config.json` of an export in that dtype holds; None: in which it was trained."""
    state = checkpoint.state
    of_run = {key: state[key] for key in ("step", "tokens", "versions")}
    origin = origin_of(state["config"].get("run", {}).get("weights"))
    of_run |= {ORIGIN: origin} if origin else {}
    return config_json(state["config"], dtype or _trained_in(checkpoint), of_run)


def config_json(config: dict[str, Any], dtype: Dtype, of_run: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds of a model.

    Args:
        config: of its run, plain.
        dtype: of its weights.
        of_run: `step`, `tokens` and `versions`, and what else is to be known of where it is from.
    """
    return {
        "model_type": _MODEL_TYPE,
        "torch_dtype": _hugging_face(dtype),
        "vocabulary": config["model"]["vocabulary"],
        "levels": config["levels"]["spectrum"],
        **of_run,
        "nlscale": config,
    }


def _trained_in(checkpoint: Checkpoint) -> Dtype:
    return Dtype(checkpoint.state["config"]["train"]["dtype"])


def _dtype_key(described: dict[str, Any]) -> str:
    """transformers calls it `dtype` from version 5 on."""
    return "dtype" if "dtype" in described else "torch_dtype"


def _hugging_face(dtype: Dtype) -> str:
    return str(_TORCH[dtype]).removeprefix("torch.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as a JSON file of an export."""
    files.write(path, (json.dumps(content, indent=2) + "\n").encode())


def _finish(path: Path) -> None:
    """Let others read a file as they can its folder, which safetensors does not, and sync it."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _check_fit(folder: Path, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    differ = [
        f"{name} is {_size(tensors[name].get_shape())}, the model's {_size(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].get_shape()) != tuple(shape)
    ]
    whole = [n for n in expected if n in tensors and tensors[n].get_dtype() not in _FLOATING]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMES_SHOWN])}"
        f"{', ...' if len(names) > _NAMES_SHOWN else ''})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (differ, "of another shape"),
            (whole, "not floating point"),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"the weights in {folder} do not fit the model of {len(expected)} tensors: "
            f"{'; '.join(problems)}; give the model and levels of its {CONFIG_FILE}"
        )


def _size(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a single number"

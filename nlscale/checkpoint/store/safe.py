"""Reading what may not be trusted: nothing that a checkpoint holds is ever run.

torch.distributed.checkpoint keeps its metadata as a pickle, and reads it with `pickle.load`, which
runs whatever the file says. Here `nlscale.checkpoint.store.unpickle` reads it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nlscale.checkpoint.store import unpickle
from nlscale.checkpoint.store.boxes import read_box
from nlscale.checkpoint.store.pieces import Piece
from nlscale.errors import Stopped, UserError

_SHOWN = 100  # characters of a name out of a file


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or that is not whole: what, where, and why."""


def load_metadata(path: Path, data: bytes) -> Metadata:
    """The metadata in the bytes of a `.metadata` file; `path` is named in errors.

    Raises:
        CheckpointError: something in it that metadata do not hold, of which nothing was run, or
            not metadata of tensors at all.
    """
    try:
        metadata = unpickle.load(data)
    except unpickle.RefusedError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a pickle can be broken in as many ways as there are exceptions
        raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error}") from error
    problem = _malformed(metadata)
    if problem:
        raise CheckpointError(f"{path} is not the metadata of a checkpoint: {problem}")
    return metadata


def stored_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """What is stored by name; `load_metadata` has checked that there is nothing but tensors."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def read_pieces(
    path: Path, files: Collection[str], metadata: Metadata, pieces: list[Piece]
) -> None:
    """Fill the pieces from a checkpoint's folder, in whatever boxes it was written.

    Every rank plans and reads for itself.

    Args:
        path: the folder.
        files: names of the files that belong to it; no other is opened.
        metadata: of `load_metadata`.
        pieces: filled in place; a dtype that differs is converted.

    Raises:
        CheckpointError: a name is not stored or has another shape, a box is not covered by what
            is stored, a file is missing or broken, or holds anything but tensors.
    """
    places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
    by_file: dict[str, list[ReadItem]] = {}
    for item in _read_items(path, metadata, pieces):
        by_file.setdefault(places[item.storage_index].relative_path, []).append(item)
    for name, items in sorted(by_file.items()):
        # also keeps a path such as ../../x from being followed
        if name not in files:
            raise CheckpointError(f"{path} is not whole: its manifest has no {name}")
        items.sort(key=lambda item: places[item.storage_index].offset)
        try:
            with open(path / name, "rb", buffering=0) as file:
                for item in items:
                    info = places[item.storage_index]
                    part = read_box(
                        file, info.offset, info.length, item.storage_offsets, item.lengths
                    )
                    _place(pieces[_number(item)], item).copy_(part)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = found[1] if found else "more than tensors"
            raise _refusal(path / name, what) from error
        except Stopped:
            raise
        except Exception as error:  # broken data fail in as many ways
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise CheckpointError(f"{path / name} cannot be read: {reason}") from error


def _place(piece: Piece, item: ReadItem) -> torch.Tensor:
    """Where in a piece what is read belongs."""
    target = piece.data.detach()
    for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        target = target.narrow(dim, start, length)
    return target


def _read_items(path: Path, metadata: Metadata, pieces: list[Piece]) -> list[ReadItem]:
    """What to read for each piece; `dest_index.index` is its number in `pieces`."""
    tensors = stored_tensors(metadata)
    wanted: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        stored = tensors.get(piece.name)
        if stored is None:
            raise CheckpointError(f"{path} holds no tensor {piece.name}")
        if tuple(stored.size) != tuple(piece.shape):
            raise CheckpointError(
                f"{path} holds {piece.name} of shape {tuple(stored.size)}, "
                f"where {tuple(piece.shape)} is wanted"
            )
        if piece.data.numel():
            wanted.setdefault(piece.name, []).append(number)
    for name in wanted:
        if overlaps(name, tensors[name]):
            raise CheckpointError(
                f"{path} holds elements of {name} twice: it was put together wrongly"
            )
    items: list[ReadItem] = []
    covered = [0] * len(pieces)
    for name, numbers in wanted.items():
        boxes = [box(pieces[number]) for number in numbers]
        for item in create_read_items_for_chunk_list(name, tensors[name], boxes):
            number = numbers[_number(item)]
            items.append(replace(item, dest_index=replace(item.dest_index, index=number)))
            covered[number] += item.lengths.numel()
        for number in numbers:
            missing = pieces[number].data.numel() - covered[number]
            if missing:
                raise CheckpointError(
                    f"{path} does not hold all of {name}: {missing} elements are missing of "
                    f"{tuple(pieces[number].data.shape)} at {tuple(pieces[number].offsets)}"
                )
    return items


def overlaps(name: str, stored: TensorStorageMetadata) -> bool:
    """Whether two boxes of a tensor have an element in common."""
    # each overlaps itself; any more than that is two that hold the same
    found = create_read_items_for_chunk_list(name, stored, stored.chunks)
    return len(found) > sum(1 for chunk in stored.chunks if chunk.sizes.numel())


def _number(item: ReadItem) -> int:
    number = item.dest_index.index
    assert number is not None
    return number


def box(piece: Piece) -> ChunkStorageMetadata:
    """The piece's box in DCP's words."""
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.data.size())


def _malformed(metadata: Any) -> str | None:
    """What is wrong with the form of what was unpickled; everything in it may be anything."""
    if not isinstance(metadata, Metadata):
        return f"it is a {type(metadata).__name__}"
    tensors, where = (vars(metadata).get(key) for key in ("state_dict_metadata", "storage_data"))
    if not isinstance(tensors, dict) or not isinstance(where, dict):
        return "it lists no tensors"
    lists: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorStorageMetadata):
            return f"{_cut(name)} is not a tensor"
        fields = vars(tensor)
        properties, size, chunks = (fields.get(key) for key in ("properties", "size", "chunks"))
        if (
            not isinstance(properties, TensorProperties)
            or not isinstance(vars(properties).get("dtype"), torch.dtype)
            or not isinstance(size, torch.Size)
            or not isinstance(chunks, list)
        ):
            return f"{_cut(name)} has no dtype, shape or boxes"
        if id(chunks) in lists:  # one of millions, for each of millions, would take for ever
            return f"{_cut(name)} has the boxes of another"
        lists.add(id(chunks))
        for chunk in chunks:
            fields = vars(chunk) if isinstance(chunk, ChunkStorageMetadata) else {}
            ends: list[Any] = [fields.get(key) for key in ("offsets", "sizes")]
            if not all(isinstance(end, torch.Size) and len(end) == len(size) for end in ends):
                return f"{_cut(name)} has a box that is none"
            if any(at + length > whole for at, length, whole in zip(*ends, size, strict=True)):
                return f"{_cut(name)} has a box that is none"
            if MetadataIndex(name, ends[0]) not in where:
                return f"{_cut(name)} has a box that is in no file"
    for info in where.values():
        fields = vars(info) if isinstance(info, _StorageInfo) else {}
        if (
            not isinstance(fields.get("relative_path"), str)
            or not all(_is_count(fields.get(key)) for key in ("offset", "length"))
            or fields.get("transform_descriptors")  # this project writes none
        ):
            return "a box is at no place in a file"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _cut(name: object) -> str:
    return ascii(name)[:_SHOWN] if isinstance(name, str) else f"a {type(name).__name__}"


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"refused: {path} holds {what}, which a checkpoint does not; nothing of it was run"
    )

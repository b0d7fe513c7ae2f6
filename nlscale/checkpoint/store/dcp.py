"""Writing a checkpoint's files with torch.distributed.checkpoint (DCP), hashed on the way."""

from __future__ import annotations

import io
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.safe import box

_NUMPY = (torch.float32, torch.float64, torch.int64)
_ITEM_BYTES = 2048  # about what torch.save adds to a tensor: names, padding, a directory


@dataclass(frozen=True)
class DataFiles:
    """What one rank wrote."""

    results: list[WriteResult]
    digests: dict[str, Digest]
    """By file name."""


def plan(pieces: list[Piece]) -> SavePlan:
    """What a rank will write, one item a piece, in their order."""
    items = []
    for piece in pieces:
        # An empty part of a tensor has nothing to store; an empty tensor has a name to store.
        if piece.data.numel() == 0 and math.prod(piece.shape) > 0:
            continue
        data = TensorWriteData(
            chunk=box(piece),
            # not create_from_tensor: whether the memory is pinned is nothing to remember
            properties=TensorProperties(dtype=piece.data.dtype),
            size=torch.Size(piece.shape),
        )
        items.append(WriteItem(_index(piece), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


def about_bytes(plans: list[SavePlan]) -> int:
    """About what the data files will need on the disk, in bytes."""
    return sum(
        math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        + _ITEM_BYTES
        for plan in plans
        for item in plan.items
        if item.tensor_data is not None
    )


def combine(plans: list[SavePlan]) -> Metadata:
    """What all ranks together will write.

    Raises:
        ValueError: ranks differ in a tensor's shape or dtype, two of their boxes overlap, or they
            leave a hole: what is saved could not be read back.
    """
    _, metadata = create_default_global_save_plan(plans)
    for item in (item for plan in plans for item in plan.items):
        data, stored = item.tensor_data, metadata.state_dict_metadata[item.index.fqn]
        assert data is not None and isinstance(stored, TensorStorageMetadata)
        if data.size != stored.size or data.properties.dtype != stored.properties.dtype:
            raise ValueError(
                f"{item.index.fqn} is both {stored.properties.dtype} {tuple(stored.size)} "
                f"and {data.properties.dtype} {tuple(data.size)}"
            )
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        whole = stored.size.numel()
        # a box overlaps itself; any more than that is two writing the same
        overlaps = create_read_items_for_chunk_list(name, stored, stored.chunks)
        if whole and len(overlaps) != len(stored.chunks):
            raise ValueError(f"{name}: an element is written twice")
        written = sum(chunk.sizes.numel() for chunk in stored.chunks)
        if written != whole:
            raise ValueError(f"{name}: {written} of {whole} elements are written")
    return metadata


def write_data(folder: Path, rank: int, pieces: list[Piece]) -> DataFiles:
    """Write this rank's pieces into one file of the folder, on the disk on return.

    Raises:
        OSError: of the disk.
    """
    own = plan(pieces)
    if not own.items:
        return DataFiles([], {})
    writer = _Writer(folder)
    writer.set_up_storage_writer(is_coordinator=False)
    # which names the file after the plan's place among those of all ranks
    own = writer.prepare_global_plan([SavePlan([])] * rank + [own])[rank]
    results = writer.write_data(own, _Pieces(pieces)).wait()
    return DataFiles(results, writer.digests)


def write_metadata(
    folder: Path, metadata: Metadata, results: list[list[WriteResult]]
) -> dict[str, Digest]:
    """Write DCP's `.metadata`: which box of which tensor is where. Raises OSError.

    Returns:
        The file's digest by its name.
    """
    writer = _Writer(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, results)
    return writer.digests


class _Pieces(SavePlanner):
    """Finds the data of an item; the plan is made by `plan`, so the rest is not needed."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._data = {_index(piece): piece.data for piece in pieces if piece.data.numel()}
        self._data |= {_index(piece): piece.data for piece in pieces if not math.prod(piece.shape)}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = self._data[write_item.index].detach()
        if data.device.type == "cpu" and data.dtype in _NUMPY and data.is_contiguous():
            # the same memory as a tensor of its own: of a view torch would save a copy
            return torch.from_numpy(data.numpy())
        return data

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


class _Writer(FileSystemWriter):
    """DCP's writer, on a file system that hashes."""

    def __init__(self, folder: Path) -> None:
        # The pieces lie still in memory, so nothing is copied ahead; files sync themselves.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _HashingFileSystem()

    @property
    def digests(self) -> dict[str, Digest]:
        return cast(_HashingFileSystem, self.fs).digests

    def storage_meta(self) -> StorageMeta | None:
        return None  # DCP's has the folder's path, which is about to change


class _HashingFileSystem(FileSystem):
    """Goes through `nlscale.checkpoint.store.files` and keeps what it says of each file."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", "this file system is for writing"
        path = Path(path)
        with files.create(path) as file:
            yield file
        self.digests[path.name] = file.digest

    def rename(self, path: str | PathLike, new_path: str | PathLike) -> None:
        path, new_path = Path(path), Path(new_path)
        files.rename(path, new_path)
        self.digests[new_path.name] = self.digests.pop(path.name)

    def mkdir(self, path: str | PathLike) -> None:
        files.make_folder(Path(path))

    def rm_file(self, path: str | PathLike) -> None:
        files.remove_file(Path(path))


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, piece.offsets)

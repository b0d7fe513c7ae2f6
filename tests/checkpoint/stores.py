"""Helpers of the tests of the checkpoint store: contents, boxes, damage, processes that die."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from nlscale.checkpoint.store import files, manifest
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint, Store

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

SHAPES = {
    "weights/embedding.weight": ((61, 48), torch.bfloat16),
    "weights/blocks.0.norm.weight": ((37,), torch.float32),
    "weights/blocks.0.memory.start": ((3, 11, 13), torch.float32),
    "optimizer/exp_avg/blocks.0.memory.start": ((3, 11, 13), torch.float64),
    "windows/tokens": ((9,), torch.int64),
    "windows/count": ((), torch.int64),
    "windows/none": ((0, 5), torch.float32),
}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of 0 to 3 dimensions and several dtypes, by name."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (shape, dtype) in SHAPES.items():
        if dtype.is_floating_point:
            made[name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            made[name] = torch.randint(-(2**62), 2**62, shape, generator=generator)
    return made


def whole(contents: dict[str, torch.Tensor]) -> list[Piece]:
    """Each tensor as one piece."""
    return [Piece(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in contents.items()]


def cut(shape: tuple[int, ...], parts: int, generator: torch.Generator) -> list[Box]:
    """Split a box into random, disjoint, odd ones that cover it; some may be empty."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    while len(boxes) < parts and shape:
        offsets, sizes = boxes.pop(int(torch.randint(len(boxes), (), generator=generator)))
        dim = int(torch.randint(len(shape), (), generator=generator))
        at = int(torch.randint(sizes[dim] + 1, (), generator=generator))
        for start, size in ((0, at), (at, sizes[dim] - at)):
            moved = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
            boxes.append((moved, (*sizes[:dim], size, *sizes[dim + 1 :])))
    return boxes


def view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of the tensor in the box."""
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def save(folder: Path, step: int, seed: int) -> dict[str, torch.Tensor]:
    """Save `tensors(seed)` as a checkpoint of one process."""
    contents = tensors(seed)
    Store(folder).write(step, whole(contents), {"step": step, "seed": seed}, None)
    return contents


def holds(checkpoint: Checkpoint, seed: int) -> bool:
    """Whether a checkpoint is, bit for bit, what `save` saved with that seed."""
    checkpoint.verify()
    assert checkpoint.state == {"step": checkpoint.step, "seed": checkpoint.state["seed"]}
    expected = tensors(seed)
    found = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in checkpoint.tensors().items()}
    checkpoint.read(whole(found))
    assert set(found) == set(expected)
    same = all(same_bits(found[name], expected[name]) for name in expected)
    assert same == (checkpoint.state["seed"] == seed)
    return same


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def vouch(folder: Path) -> None:
    """Make the manifest agree with the files as they are now, as who forges them would."""
    step = json.loads((folder / manifest.NAME).read_bytes())["step"]
    digests = {
        path.name: Digest(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name != manifest.NAME
    }
    (folder / manifest.NAME).write_bytes(manifest.render(step, digests))


def dies_after(operations: int, work: Callable[[], object]) -> bool:
    """Run work in a process that is killed after so many file operations.

    Returns:
        False: it needed no more than that and finished.
    """
    child = os.fork()
    if child == 0:
        left = operations

        def count(operation: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        files.on_operation = count
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

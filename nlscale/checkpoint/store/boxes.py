"""Reading a tensor that `torch.save` wrote somewhere in a file, or a part of it and no more."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import IO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_TO_FIND_A_PART = 1 << 16
"""Bytes; reading as many takes no longer than finding out where what is wanted lies."""


def read_box(
    file: io.FileIO, offset: int, length: int, starts: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """A box of a stored tensor, by one read: nothing in the file is run.

    Args:
        file: unbuffered.
        offset: where in it `torch.save` began, in bytes.
        length: how many bytes it wrote.
        starts: where the box begins in the tensor, one number a dimension.
        sizes: of the box, each at least 1.

    Raises:
        Exception: what is stored is broken, in one of many ways.
    """
    # no dtype is wider: at least this much would be read in vain
    if length - 8 * torch.Size(sizes).numel() > _TO_FIND_A_PART:
        return _read_part(_Within(file, offset, length), starts, sizes)
    # of a small one torch reads more than all, piece by piece
    whole: io.IOBase = _Within(file, offset, length)
    if length < _TO_FIND_A_PART:
        whole = io.BytesIO(_pread(file, offset, length))
    found = torch.load(cast(IO[bytes], whole), weights_only=True)
    _check(found, starts, sizes)
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        found = found.narrow(dim, start, size)
    return found


def _read_part(file: _Within, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """From the first element of the box to its last: whole rows that lie next to each other are
    read and nothing else; of a box that is narrower, what lies between its rows as well."""
    with FakeTensorMode():  # finds out what the tensor is like, and where its elements are
        stored = torch.load(cast(IO[bytes], file), weights_only=True)
    _check(stored, starts, sizes)
    strides, width = stored.stride(), stored.element_size()
    first = stored.storage_offset() + sum(s * at for s, at in zip(strides, starts, strict=True))
    count = 1 + sum(s * (size - 1) for s, size in zip(strides, sizes, strict=True))
    place = stored.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
    data = _pread(file.file, file.offset + place + first * width, count * width)
    return torch.frombuffer(data, dtype=stored.dtype).as_strided(list(sizes), strides)


def _check(stored: object, starts: Sequence[int], sizes: Sequence[int]) -> None:
    if not isinstance(stored, Tensor) or stored.dim() != len(starts):
        raise ValueError("it holds something else than its metadata say")
    if any(at + size > most for at, size, most in zip(starts, sizes, stored.shape, strict=True)):
        raise ValueError("it holds less than its metadata say")


def _pread(file: io.FileIO, offset: int, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise EOFError("it ends early")
        done += count
    return data


class _Within(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self.file, self.offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + to
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._length - self._at))
        count = os.preadv(self.file.fileno(), [memoryview(buffer)[:wanted]], self.offset + self._at)
        self._at += count
        return count

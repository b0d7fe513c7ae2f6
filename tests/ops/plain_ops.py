"""What stands in for DeepSpeed's compiled operations in tests: their arithmetic, in numpy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nlscale.ops import compiled


class PlainCpuAdam:
    """`cpu_adam`: an update in fp32 with a bias correction of its own, as
    csrc/adam/cpu_adam_impl.cpp has it."""

    def __init__(self) -> None:
        self.mode: dict[int, bool] = {}

    def create_adam(self, number: int, *numbers: Any) -> None:
        self.mode[number] = numbers[-2]

    def destroy_adam(self, number: int) -> None:
        del self.mode[number]

    def adam_update(
        self, number: int, step: int, lr: float, beta1: float, beta2: float, eps: float,
        decay: float, corrects: bool, weights: Tensor, gradient: Tensor, m: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        assert self.mode[number] and step == 1 and not corrects
        w, g, m_, v_ = (t.numpy() for t in (weights, gradient, m, v))
        f = np.float32
        m_[:] = m_ * f(beta1) + g * (f(1) - f(beta1))
        v_[:] = v_ * f(beta2) + g * g * (f(1) - f(beta2))
        if decay:
            w += w * (f(-lr) * f(decay))
        w += f(-lr) * (m_ / (np.sqrt(v_) + f(eps)))


class PlainAsyncIo:
    """`async_io`: reads and writes of whole buffers, which report nothing of what fails.

    `fault` is called before each with its kind and number, from 1, and the path; it may do what
    drives do. Where it returns a share of a write, the rest of that is lost; below 0, the call says
    that it could not begin.
    """

    fault: Callable[[str, int, str], float | None] = staticmethod(lambda kind, number, path: None)
    done: ClassVar[dict[str, int]] = {}
    flags: ClassVar[int] = 0
    """Beside those of opening; O_DIRECT, as the operation has it, where a test's drive can."""

    class aio_handle:
        def __init__(self, block: int, depth: int, single: bool, overlap: bool, threads: int):
            self.threads = threads

        def new_cpu_locked_tensor(self, size: int, example: Tensor) -> Tensor:
            room = torch.empty(size + 4096, dtype=example.dtype)
            begin = -room.data_ptr() % 4096
            return room[begin : begin + size]

        def _begin(self, kind: str, buffer: Tensor, path: str) -> float | None:
            assert buffer.nbytes % (4096 * self.threads) == buffer.data_ptr() % 4096 == 0
            number = PlainAsyncIo.done[kind] = PlainAsyncIo.done.get(kind, 0) + 1
            return PlainAsyncIo.fault(kind, number, path)

        def sync_pread(self, buffer: Tensor, path: str, offset: int) -> int:
            self._begin("read", buffer, path)
            file = os.open(path, os.O_RDONLY | PlainAsyncIo.flags)
            assert os.fstat(file).st_size >= buffer.nbytes + offset  # it aborts
            os.preadv(file, [memoryview(buffer.numpy())], 0)
            os.close(file)
            return 1

        def sync_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
            share = self._begin("write", buffer, path)
            if share is not None and share < 0:
                return -1
            written = int((1 if share is None else share) * buffer.nbytes)
            file = os.open(path, os.O_WRONLY | PlainAsyncIo.flags)
            assert os.pwritev(file, [memoryview(buffer.numpy())[:written]], 0) == written
            os.close(file)
            if share is None:
                PlainAsyncIo.fault("written", PlainAsyncIo.done["write"], path)
            return 1


def stand_in() -> None:
    """From now on operations in this process are these."""
    made = {"cpu_adam": PlainCpuAdam(), "async_io": PlainAsyncIo}
    compiled.load = made.__getitem__  # type: ignore[assignment]
    sys.modules["nlscale.ops.compiled"].check = lambda name: {}  # type: ignore[attr-defined]

"""Triton's kernels run by its interpreter, on CPU tensors, in a process of its own.

The interpreter is chosen when Triton is imported, so tests send a function of theirs to a process
that had not imported it. What is sent is pickled; what the function raises is raised here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

Call = Callable[..., Any]


@contextmanager
def interpreter() -> Iterator[Call]:
    """Gives `call(function, *arguments, **options)`."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_start) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process
        yield lambda function, *given, **options: pool.submit(function, *given, **options).result()


def _start() -> None:
    """Let bf16 and TF32 mean what they mean on a GPU: Triton's interpreter cuts off what should be
    rounded, would multiply matrices of the bit patterns, and multiplies in fp32 for TF32."""
    import triton.language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def operand(self: Any, x: Any, precision: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return cast(self, x, tl.float32)
        if x.dtype.scalar == tl.float32 and precision == INPUT_PRECISION.TF32:
            bits = np.ascontiguousarray(x.data).view(np.uint32)
            return TensorHandle(((bits + 0x1000) & 0xFFFFE000).view(np.float32), tl.float32)
        return x

    def create_dot(self: Any, x: Any, y: Any, d: Any, precision: Any, *rest: Any) -> Any:
        x, y = (operand(self, z, precision) for z in (x, y))
        return dot(self, x, y, d, precision, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot

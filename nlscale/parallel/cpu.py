"""Lets megatron-core run where there is no CUDA, on CPU and gloo; does nothing where there is.

megatron-core asks for CUDA by name in a few places: the device of a counter, the type string of
a parameter, streams. With these answers mapped to the CPU its groups, schedules, gradient buffers
and distributed optimizer compute the same numbers. Tests and the quickstart stand on this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ASKS_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


class _CudaMeansCpu(TorchFunctionMode):
    """device="cuda" is the CPU, `.cuda()` is identity, `.type()` names a CUDA tensor."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Stream:
    """A stream on a machine where everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_torch_zeros = torch.zeros
_ABSENT: Any = object()


def _zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
    if str(kwargs.get("device", "")).startswith("cuda"):
        kwargs["device"] = "cpu"
    return _torch_zeros(*args, **kwargs)


def install() -> None:
    """Replace the few functions of `torch.cuda` that megatron-core calls unconditionally."""
    if torch.cuda.is_available():
        return
    _keep_freed_memory()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args: None
    cuda.Stream = cuda.ExternalStream = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    # The schedules make their token counter on "cuda". Everything that runs inside a schedule,
    # the whole model, would pay for a function mode, so this one function is replaced instead.
    any_torch: Any = torch
    any_torch.zeros = _zeros


def import_megatron_core() -> None:
    """Import megatron-core without what it imports in vain, 40 % of all that a rank imports.

    Its fused functions, none of which nlscale calls here, are handed to `torch.compile` when they
    are imported, which imports the compiler; and its timers look for wandb.
    """
    if _has_gpu():
        return
    any_torch: Any = torch
    compiles, tracker = torch.compile, sys.modules.get("wandb", _ABSENT)
    any_torch.compile = lambda function: function
    sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it is an ImportError
    try:
        import megatron.core  # noqa: F401
    finally:
        any_torch.compile = compiles
        del sys.modules["wandb"]
        if tracker is not _ABSENT:
            sys.modules["wandb"] = tracker


def _has_gpu() -> bool:
    """Whether there is one, by asking its driver's library for management, where that is there.

    CUDA itself is not begun, after which no process that is forked from this one could use it.
    """
    asked = os.environ.get(_ASKS_NVML)
    os.environ[_ASKS_NVML] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        if asked is None:
            del os.environ[_ASKS_NVML]
        else:
            os.environ[_ASKS_NVML] = asked


def _keep_freed_memory() -> None:
    """Where the C library is glibc: do not give large freed tensors back to the kernel.

    The same sizes are asked for again in every step, and memory that comes from the kernel has to
    be mapped and zeroed page by page first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def cuda_by_name() -> Iterator[None]:
    """For calls into megatron-core that spell "cuda"; a no-op where there is CUDA."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCpu():
        yield

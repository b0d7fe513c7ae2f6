"""A stand-in for a GPU: tensors without numbers that say they are on one.

They are tensors of torch's "meta" device, which have a shape and a dtype. What nlscale does where
there is a GPU runs as far as asking for it, and what would fail or wait there fails here: an
operand left on the host, a kernel given something that it does not take, a number asked for. What
kernels compute is another matter: tests/ops runs them in Triton's interpreter. Collectives do
nothing, so that one process is any rank of any world.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.jit import JITFunction

_GPU = torch.device("cuda", 0)
_TYPES = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}
_PLACED = ("to", "new_empty", "new_zeros", "new_full")
_NUMBERS = ("item", "__float__", "__int__", "__bool__")
_is_meta = Tensor.is_meta.__get__  # type: ignore[attr-defined]

launches: Counter[str] = Counter()
"""Kernels that were launched, by name."""
waits: list[str] = []
"""One for each time that the host waited until the GPU had done everything."""


class _Gpu(TorchFunctionMode):
    """device="cuda" means meta, and a meta tensor says that it is on a GPU."""

    def __init__(self, numbers: bool) -> None:
        super().__init__()
        self._numbers = numbers

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if "device" in kwargs:
            kwargs["device"] = _place(_GPU if kwargs["device"] == 0 else kwargs["device"])
        if name == "__get__":
            return _attribute(function, *args)
        if name == "pin_memory":
            return args[0]
        if name == "type" and len(args) == 1 and _is_meta(args[0]):
            return _TYPES[args[0].dtype]
        if name == "copy_" and kwargs.get("non_blocking") and not _is_meta(args[0]):
            return args[0].fill_(1)  # some number has arrived on the host
        if self._numbers and name in _NUMBERS and _is_meta(args[0]):
            return 1
        if name in _PLACED:
            args = tuple(map(_place, args))
        return function(*args, **kwargs)


def _attribute(function: Any, tensor: Tensor) -> Any:
    which, value = function.__self__.__name__, function(tensor)
    if which == "is_cuda":
        return _is_meta(tensor)
    return _GPU if which == "device" and value.type == "meta" else value


def _place(given: Any) -> Any:
    """Where tensors of this device are, if it is one."""
    named = isinstance(given, str | torch.device)
    return "meta" if named and torch.device(given).type == "cuda" else given


@contextlib.contextmanager
def stand_in(rank: int = 0, world: int = 1, numbers: bool = False) -> Iterator[None]:
    """Make this process, which is to end soon, a rank with a GPU.

    Args:
        rank: of the world.
        world: how many ranks it has.
        numbers: whether a number asked for is given (1), as where a time is taken, or is an error.
    """
    _have_cuda()
    _have_others(rank, world)
    any_torch: Any = torch
    any_torch.autograd.backward, any_torch.autograd.grad = _backward, _grad
    any_torch.nn.Module.to = _module_to
    JITFunction.run = _launch
    torch.compiler.set_stance("force_eager")
    with _Gpu(numbers):
        yield


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


def _have_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *args: "stand-in"
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.synchronize = lambda *args: waits.append("synchronize")
    for name in ("set_device", "set_rng_state", "manual_seed", "empty_cache",
                 "reset_peak_memory_stats"):  # fmt: skip
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args: 1 << 30


def _have_others(rank: int, world: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    any_dist: Any = dist
    new_group = dist.new_group
    any_dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})

    def all_gather_object(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    any_dist.all_gather_object = all_gather_object
    # torch has the others for meta tensors, too
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"):
        library.impl(f"c10d::{name}", "meta", lambda *args: FakeWork().boxed())


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    for name, x in {**dict(zip(kernel.arg_names, args, strict=False)), **options}.items():
        if isinstance(x, Tensor):
            assert x.is_cuda, f"{name} of {kernel.__name__} is on the {x.device}"
            assert x.is_contiguous(), f"{name} of {kernel.__name__} is not contiguous"
    launches[kernel.__name__] += 1


def _backward(outputs: Any, d_outputs: Any = None, *args: Any, **kwargs: Any) -> None:
    """torch's own would leave the mode for the whole pass."""
    _run_backward(outputs, d_outputs, (), accumulate_grad=True)


def _grad(outputs: Any, inputs: Any, d_outputs: Any = None) -> tuple[Tensor, ...]:
    return _run_backward(outputs, d_outputs, _tuple(inputs), accumulate_grad=False)


def _run_backward(outputs: Any, d_outputs: Any, inputs: Any, accumulate_grad: bool) -> Any:
    outputs = _tuple(outputs)
    given = _tuple(d_outputs) if d_outputs is not None else (None,) * len(outputs)
    return torch.autograd.graph._engine_run_backward(
        outputs,
        tuple(torch.ones_like(y) if d is None else d for y, d in zip(outputs, given, strict=True)),
        False, False, inputs, allow_unreachable=True, accumulate_grad=accumulate_grad,
    )  # fmt: skip


def _tuple(x: Any) -> tuple[Any, ...]:
    return (x,) if isinstance(x, Tensor) or x is None else tuple(x)


def _module_to(self: torch.nn.Module, device: Any, dtype: Any = None) -> torch.nn.Module:
    """torch's own keeps the attributes of parameters on a GPU, but not of those without numbers."""
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there = torch.empty(p.shape, dtype=dtype or p.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(there, p.requires_grad)
                module._parameters[name].__dict__.update(p.__dict__)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    return self

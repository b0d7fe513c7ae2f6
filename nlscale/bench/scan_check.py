"""`nlscale bench scan --check`: whether the kernels compute the right thing on this device.

Compilers for GPUs have miscompiled kernels of this kind, silently (flash-linear-attention #640 and
#984, Triton 3.4 to 3.7 on Hopper), so every size they are launched with is run here, as it is
launched in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nlscale.bench.clock import here, name_of
from nlscale.bench.scan import Inputs, Size, triton_version
from nlscale.config import Mixer
from nlscale.ops.memory import memory_scan
from nlscale.ops.reference import memory_reference
from nlscale.ops.triton import LAUNCHES

BOUNDS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Norm of the error by norm of the value; bf16 products leave 0.3e-2 to 3e-2."""
_MIXERS = (Mixer.hope, Mixer.gated_delta, Mixer.hope_pure)
_ON_CPU = ((16, 16),)
# A number or two may happen to vanish: compared by the norm of all that are named.
_TOGETHER = {
    "eta": ("eta", "alpha"),
    "alpha": ("eta", "alpha"),
    "lambda_key": ("lambda_key", "key"),
    "lambda_value": ("lambda_value", "value"),
}


def check_scan() -> dict[str, Any]:
    """Reads and all gradients of each mixer, chunk, head size and dtype, against a reference.

    The reference is the token-by-token recurrence in float64, on the CPU, for short sequences, and
    for some that fill a GPU torch's chunk form in fp32. Half of the heads have keys that are alike.
    Each runs twice: the kernels have no reason to give another result.

    Returns:
        `ok`, what it ran on, and `rows`: the largest `error` and of `what`, its `bound`, whether
        the second run was the same (`repeats`), and what it was compared with (`against`).
    """
    device = here()
    rows = [
        _check(mixer, size, chunk, dtype, device, large)
        for mixer in _MIXERS
        for chunk, size, dtype, large in _cases(device)
    ]
    return {
        "ok": all(row["ok"] for row in rows),
        "device": name_of(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "rows": rows,
    }


def _cases(device: torch.device) -> Iterator[tuple[int, Size, torch.dtype, bool]]:
    """Chunk, size, dtype, and whether it is large."""
    on_gpu = device.type == "cuda"
    for chunk, d in LAUNCHES if on_gpu else _ON_CPU:
        short = Size(1, 2 * chunk + chunk // 2 + 1, 2, d)
        yield chunk, short, torch.bfloat16, False
        yield chunk, short, torch.float32, False
        if on_gpu and chunk == 64:
            yield chunk, Size(8, 1024, 16, d), torch.bfloat16, True


def _check(
    mixer: Mixer, size: Size, chunk: int, dtype: torch.dtype, device: torch.device, large: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = Inputs(mixer, size, chunk, dtype, device)
    with torch.no_grad():
        alike = inputs.leaves["a"][:, ::2]
        alike.copy_(alike[:, :, :1] + 0.1 * alike)
    weight = torch.randn_like(inputs.leaves["a"])
    first, second = (_run(memory_scan(*inputs.arguments())[0], inputs, weight) for _ in range(2))
    if large:
        exact = inputs.to(torch.float32, device)
        want = _run(memory_scan(*exact.arguments())[0], exact, weight)
    else:
        exact = inputs.to(torch.float64, "cpu")
        want = _run(memory_reference(*exact.arguments()), exact, weight.cpu())
    errors = _errors(first, want)
    what = max(errors, key=lambda name: errors[name])
    repeats = all(torch.equal(first[name], second[name]) for name in first)
    return {
        "mixer": mixer.value,
        "size": str(size),
        "chunk": chunk,
        "dtype": str(dtype).removeprefix("torch."),
        "path": inputs.path,
        "against": "torch in fp32" if large else "the recurrence in float64",
        "error": errors[what],
        "what": what,
        "bound": BOUNDS[dtype],
        "repeats": repeats,
        "ok": errors[what] <= BOUNDS[dtype] and repeats,
    }


def _run(read: Tensor, inputs: Inputs, weight: Tensor) -> dict[str, Tensor]:
    """The reads, and the derivatives by everything, by name."""
    leaves = inputs.leaves
    gradients = torch.autograd.grad(read, [*leaves.values()], weight.to(read.dtype))
    return {"reads": read.detach(), **dict(zip(leaves, gradients, strict=True))}


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error by norm of the value; infinite where a value is not finite."""
    norms = {name: value.double().norm().item() for name, value in want.items()}
    errors = {}
    for name, value in want.items():
        scale = sum(norms[part] for part in _TOGETHER.get(name, (name,)) if part in norms)
        error = (got[name].to(value.device).double() - value.double()).norm().item() / scale
        errors[name] = error if error == error else float("inf")
    return errors

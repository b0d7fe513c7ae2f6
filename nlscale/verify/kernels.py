"""`nlscale bench scan --check`: whether the kernels compute the right thing on this device.

Every size they are launched with is run, as it is launched in training (`nlscale.ops.check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nlscale.bench.clock import here, name_of
from nlscale.bench.progress import each
from nlscale.bench.scan import Size, model_of, triton_version
from nlscale.levels.spectrum import BLOCK, INTEGER_BITS
from nlscale.model.mixers.memory.check import inputs_of
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.table import mixer
from nlscale.ops.check import (
    BOUNDS,
    ScanInputs,
    accumulation_errors,
    attention_errors,
    errors_at_size,
    loss_errors,
    packing_errors,
    relative_errors,
    scan_results,
)
from nlscale.ops.compiler import compiler_for
from nlscale.ops.memory.kernels.sizes import SIZES

_MIXERS = ("hope", "gated-delta", "hope-pure")
"""One of each kind of memory that the kernels know."""
_ON_CPU = ((16, 16),)
"""Where there are no kernels, and the torch form takes any size."""
_COLUMNS = 32000
_TRAINING = "as in training"


@dataclass(frozen=True)
class _Case:
    name: str
    chunk: int
    size: Size
    dtype: torch.dtype = torch.bfloat16


def check_scan(
    chunk: int | None = None, head: int | None = None, short: bool = False
) -> dict[str, Any]:
    """Reads and all gradients of each mixer, chunk, head size and dtype, against a reference.

    The reference is the token-by-token recurrence in float64, on the CPU, for short sequences;
    torch's chunk form, in float64 on the CPU for one of several documents, and in fp32 for some
    that fill a GPU and for long ones. Half of the heads have keys that are alike. Each runs twice:
    the kernels have no reason to give another result. A micro batch of training, for whose sizes
    Triton compiles other kernels than for short sequences, is a sequence in float64 many times. On
    a GPU follow the loss with its gradient, attention within documents, the sum of a weight's
    gradients, and gradients as integers.

    Args:
        chunk: check the scan in chunks of this size alone; None: in each that kernels take. On a
            CPU, which has none, it is in chunks of 16.
        head: likewise, heads of this dimension alone.
        short: leave out what takes a GPU's memory, or a CPU seconds to compare with.

    Returns:
        `ok`, what it ran on, and `rows`: the largest `error` and of `what`, its `bound`, whether
        the second run was the same (`repeats`), and what it was compared with (`against`).
    """
    device = here()
    cases = _cases(device, chunk, head, short)
    parts = [(mixer, case) for case in cases for mixer in _MIXERS]
    rows = [_check(*part, device) for part in each("scan --check", parts, _label)]
    if device.type == "cuda":
        rows += [_check_loss(dtype, device) for dtype in BOUNDS]
        rows += [_check_attention(d, device) for d in (64, 128)]
        rows.append(_check_accumulation(device))
        rows += [_check_packing(bits, device) for bits in INTEGER_BITS.values()]
    compiler = compiler_for(device)
    return {
        "ok": all(row["ok"] for row in rows),
        "device": name_of(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "ptxas": None if compiler is None else compiler.ptxas,
        "rows": rows,
    }


def _cases(
    device: torch.device, only_chunk: int | None, only_head: int | None, short_ones: bool
) -> Iterator[_Case]:
    on_gpu = device.type == "cuda"
    for chunk, d in SIZES if on_gpu else _ON_CPU:
        if on_gpu and (only_chunk not in (None, chunk) or only_head not in (None, d)):
            continue
        short = Size(1, 2 * chunk + chunk // 2 + 1, 2, d)
        yield _Case("short", chunk, short)
        yield _Case("short", chunk, short, torch.float32)
        yield _Case("one token", chunk, Size(1, 1, 2, d))
        yield _Case("documents", chunk, Size(2, 5 * chunk, 2, d))
        if on_gpu and not short_ones:
            yield _Case(_TRAINING, chunk, Size(8, 64 * chunk, 16, d))
        if on_gpu and not short_ones and chunk == 64:
            yield _Case("large", chunk, Size(8, 1024, 16, d))
            yield _Case("long", chunk, Size(1, 32768, 2, d))


def _label(part: tuple[str, _Case]) -> str:
    name, case = part
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{name}, {case.name}, {case.size} in chunks of {case.chunk}, {dtype}"


def _inputs(name: str, case: _Case, device: torch.device) -> ScanInputs:
    """Of a case of training those that are repeated."""
    size, facts = case.size, mixer(name)
    assert isinstance(facts, MemoryFacts)
    model = model_of(name, size, case.chunk)
    rows, heads = (1, 2) if case.name == _TRAINING else (size.batch, size.heads)
    return inputs_of(facts, model, rows, size.length, case.dtype, device, heads)


def _check(name: str, case: _Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    size, chunk, dtype = case.size, case.chunk, case.dtype
    inputs = _inputs(name, case, device)
    inputs.make_keys_alike()
    about = {
        "kernel": name,
        "case": case.name,
        "size": str(size),
        "chunk": chunk,
        "path": inputs.path,
    }
    if case.name == _TRAINING:
        errors = errors_at_size(inputs, size.batch, size.heads)
        # its programs repeat each other, or are off by infinity
        return {**about, "against": "torch in float64", **_worst(errors, dtype)}
    carried = None
    if case.name == "documents":
        carried = torch.tensor([[0.0, 1, 0, 1, 1], [0, 1, 1, 1, 0]], device=device)
    weight = torch.randn_like(inputs.leaves["a"])
    first, second = (scan_results(inputs, weight, carried) for _ in range(2))
    if case.name in ("large", "long"):
        against = "torch in fp32"
        want = scan_results(inputs.to(torch.float32, device), weight)
    elif carried is not None:
        against = "torch in float64"
        want = scan_results(inputs.to(torch.float64, "cpu"), weight, carried.cpu())
    else:
        against = "the recurrence in float64"
        want = scan_results(inputs.to(torch.float64, "cpu"), weight, reference=True)
    repeats = all(torch.equal(first[name], second[name]) for name in first)
    return {**about, "against": against, **_worst(relative_errors(first, want), dtype, repeats)}


def _check_loss(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "kernel": "cross entropy",
        "case": "rows of logits",
        "size": str(_COLUMNS),
        "against": "torch in float64",
        **_worst(loss_errors(_COLUMNS, dtype, device), dtype),
    }


def _check_attention(d: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "kernel": "attention",
        "case": "documents",
        "size": str(Size(2, 200, 2, d)),
        "against": "torch in float64",
        **_worst(attention_errors(d, torch.bfloat16, device), torch.bfloat16),
    }


def _check_packing(bits: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "kernel": "wire",
        "case": f"int{bits}",
        "size": f"blocks of {BLOCK}",
        "against": "torch on the CPU",
        **_worst(packing_errors(bits, BLOCK, device), torch.float32),
    }


def _check_accumulation(device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "kernel": "weight gradients",
        "case": "two sums of bf16 products",
        "size": "",
        "against": "torch in float64",
        **_worst(accumulation_errors(torch.bfloat16, device), torch.float32),
    }


def _worst(errors: dict[str, float], dtype: torch.dtype, repeats: bool = True) -> dict[str, Any]:
    what = max(errors, key=lambda name: errors[name])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors[what],
        "what": what,
        "bound": BOUNDS[dtype],
        "repeats": repeats,
        "ok": errors[what] <= BOUNDS[dtype] and repeats,
    }

"""`nlscale bench scan --check`: whether the kernels compute the right thing on this device.

Every size they are launched with is run, as it is launched in training (`nlscale.ops.check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nlscale.bench.clock import here, name_of
from nlscale.bench.scan import Size, model_of, triton_version
from nlscale.config import Mixer
from nlscale.ops.check import BOUNDS, ScanInputs, relative_errors, scan_results
from nlscale.ops.triton import LAUNCHES

_MIXERS = (Mixer.hope, Mixer.gated_delta, Mixer.hope_pure)
_ON_CPU = ((16, 16),)


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
    inputs = ScanInputs(model_of(mixer, size, chunk), size.batch, size.length, dtype, device)
    inputs.make_keys_alike()
    weight = torch.randn_like(inputs.leaves["a"])
    first, second = (scan_results(inputs, weight) for _ in range(2))
    if large:
        exact = inputs.to(torch.float32, device)
        want = scan_results(exact, weight)
    else:
        exact = inputs.to(torch.float64, "cpu")
        want = scan_results(exact, weight, reference=True)
    errors = relative_errors(first, want)
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

"""When the kernels are used, and that nothing needs Triton where they are not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from ops.problems import MODES
from torch._subclasses.fake_tensor import FakeTensorMode

from nlscale.ops.memory.kernels.sizes import supports


def chosen(
    mode: str = "hope",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    d: int = 64,
    chunk: int = 64,
    **rules_of: bool | float,
) -> bool:
    rules = replace(MODES[mode], chunk=chunk, **rules_of)
    with FakeTensorMode():
        x = torch.empty(2, 4, 128, d, device=device, dtype=dtype)
    return supports(x, x, x, rules, static=mode == "gated-delta")


@pytest.mark.parametrize("mode", ["hope", "pure", "gated-delta"])
@pytest.mark.parametrize(("d", "chunk"), [(64, 64), (128, 64), (64, 16), (128, 32)])
def test_bf16_on_a_gpu_runs_through_the_kernels(mode: str, d: int, chunk: int) -> None:
    assert find_spec("triton"), (
        "triton not found: pip install triton (Linux; it is in nlscale[dev])"
    )
    assert chosen(mode, d=d, chunk=chunk)
    assert chosen(mode, d=d, chunk=chunk, decayed_write=True, strength=2.0)


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"d": 96},
        {"d": 256},
        {"chunk": 128},
        {"chunk": 48},
        {"mode": "paper"},
        {"reads_state": True},
        {"erases": False},
    ],
    ids=str,
)
def test_all_else_runs_through_torch(other: dict[str, object]) -> None:
    assert not chosen(**other)  # type: ignore[arg-type]


def test_triton_is_not_needed_where_the_kernels_are_not_used() -> None:
    program = """
import sys
sys.modules["triton"] = None  # its import fails
import nlscale.model.decoder, nlscale.model.mixers.memory.module
import torch
from nlscale.ops.memory.rules import MemoryRules
from nlscale.ops.memory.scan import memory_scan
rules = MemoryRules(16, anchored=True, c=0.0, normalize_value=True, main_memory=True)
x = torch.ones(1, 1, 3, 16, dtype=torch.bfloat16)
read, _ = memory_scan(x, x, x, x[..., 0], x[..., 0], None, rules)
print(read.shape[2], read.isfinite().all().item())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "3 True\n", ran.stderr

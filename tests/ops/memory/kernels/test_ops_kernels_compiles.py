"""Every kernel compiles for GPUs as it is launched, and fits their shared memory. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from ops.problems import Problem

from nlscale.ops.memory.scan import memory_scan

SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}
"""Bytes a program may have, by compute capability: H100 and H200, A100."""
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Launches:
    """Stands in for the kernels of `fused.py` there, and notes how they are launched."""

    def __init__(self, kernel: Any, noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]):
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **options: self.noted.append((self.kernel, given, options))


def launches(
    patch: pytest.MonkeyPatch,
    mode: str,
    length: int,
    chunk: int,
    documents: bool = False,
    **sizes: int,
) -> list[Any]:
    """Of a forward and backward pass of bf16 inputs."""
    import nlscale.ops.memory.kernels.sizes
    from nlscale.ops.memory.kernels import fused as scan

    noted: list[Any] = []
    for name, kernel in vars(scan).copy().items():
        if name.endswith("_kernel"):
            patch.setattr(scan, name, Launches(kernel, noted))
    patch.setattr(nlscale.ops.memory.kernels.sizes, "supports", lambda *inputs: True)
    problem = Problem(mode, length, chunk=chunk, dtype=torch.float32, **sizes)
    for name in ("a", "b", "q"):
        problem.leaves[name] = problem.leaves[name].detach().bfloat16().requires_grad_()
    carried = torch.ones(2, length // chunk) if documents else None
    scanned, _ = memory_scan(*problem.inputs(), problem.weights(), problem.rules, None, carried)
    scanned.sum().backward()
    return noted


def launches_of_the_loss(patch: pytest.MonkeyPatch) -> list[Any]:
    from nlscale.ops.loss import kernel as cross_entropy

    noted: list[Any] = []
    for name, kernel in vars(cross_entropy).copy().items():
        if name.endswith("_kernel"):
            patch.setattr(cross_entropy, name, Launches(kernel, noted))
    logits, targets = torch.zeros(8, 32000, dtype=torch.bfloat16), torch.zeros(8).long()
    largest, _, _ = cross_entropy.row_statistics(logits, targets)
    cross_entropy.to_gradient_(logits, targets, largest, largest)
    return noted


def compiled(launch: Any, capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, given, options = launch
    values = dict(zip(kernel.arg_names, given, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name.islower() and value not in (None, 1):  # Triton takes those as constants
            signature[name] = "i32"
        else:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    how = {name: options[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)


@pytest.mark.parametrize(
    ("mode", "chunk", "d", "capability", "documents"),
    [
        ("hope", 64, 64, 90, True),
        ("hope", 64, 128, 90, False),
        ("hope", 16, 64, 90, False),
        ("hope", 64, 64, 80, False),
        ("pure", 64, 64, 90, False),
        ("gated-delta", 64, 64, 90, False),
    ],
)
def test_every_kernel_compiles_and_fits(
    mode: str,
    chunk: int,
    d: int,
    capability: int,
    documents: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = launches(monkeypatch, mode, 2 * chunk, chunk, documents, d=d)
    assert len(noted) == {"hope": 10, "pure": 7, "gated-delta": 7}[mode]
    for launch in noted:
        kernel = compiled(launch, capability)
        used = kernel.metadata.shared
        assert kernel.asm["cubin"] and used <= SHARED_MEMORY[capability], (
            f"{launch[0].__name__} takes {used} bytes of shared memory"
        )


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_loss_compiles(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = launches_of_the_loss(monkeypatch)
    assert len(noted) == 2
    assert all(compiled(launch, capability).asm["cubin"] for launch in noted)


def test_one_token_of_one_head_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in launches(monkeypatch, "hope", 1, 16, d=16, heads=1, batch=1):
        assert compiled(launch, 90).asm["cubin"]

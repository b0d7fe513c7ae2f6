"""The memory as fused kernels for GPUs; `nlscale.ops.memory.scan` chooses between it and torch.

This file says what the kernels take, and imports no Triton, which not every build of torch brings
along, nor torch, without which plans are made. `fused.py` runs them. Forward: `pi` (serial: what Pi
is after a chunk makes the keys of the next), `writes` (all chunks at once), `main` (serial) and
`reads` (all at once). Backward: `writes` again, `reads`, `main` (serial), `writes`, `pi` (serial),
`inputs`. Only the states at the start of each chunk are kept in between; the rest of a chunk is
made anew from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from nlscale.ops.memory.rules import MemoryRules


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched."""

    warps: int = 4
    stages: int = 1
    """Of its loop over chunks; 2: the tiles of the next chunk are fetched ahead."""
    registers: int | None = None
    """At most, a thread; None: as many as the compiler likes."""


_ONE, _AHEAD = Launch(), Launch(stages=2)
_THREE_AT_ONCE = Launch(registers=168)
"""Three programs of four warps share the registers of a multiprocessor."""
_SMALL = {
    "pi": _AHEAD,
    "writes": _ONE,
    "main": _AHEAD,
    "reads": _ONE,
    "writes for backward": _ONE,
    "reads_backward": _ONE,
    "main_backward": _AHEAD,
    "writes_backward": _ONE,
    "pi_backward": _AHEAD,
    "inputs_backward": _ONE,
}
_LARGE = {**_SMALL, "pi": _ONE, "pi_backward": _ONE}
_BY_HEAD = {16: _SMALL, 32: _SMALL, 64: _SMALL, 128: _LARGE}
_ON_HOPPER = {
    64: {
        "writes": _THREE_AT_ONCE,
        "reads_backward": _THREE_AT_ONCE,
        "inputs_backward": _AHEAD,
    },
    128: {
        "pi": _AHEAD,
        "pi_backward": Launch(warps=8),
        "inputs_backward": Launch(warps=8),
    },
}
_HOPPER = 9
COLUMNS = {16: 16, 32: 32, 64: 64, 128: 64}
"""Of S, that a program of its serial passes carries, by dimension of a head."""
CHUNKS = (16, 32, 64)
SIZES = [(chunk, d) for chunk in CHUNKS for d in _BY_HEAD]
"""Tokens of a chunk and dimension of a head that there are kernels for."""


def launches(d: int, generation: int) -> dict[str, Launch]:
    """How each kernel is launched, by its name.

    Chosen by what `nlscale bench scan --compiled` says at chunk 64, not by measurements yet. Four
    warps make one Hopper matrix instruction of 64 rows; eight would compute them twice, but at
    d = 128 the last two kernels of the backward pass then spill half as much, and have a
    multiprocessor to themselves anyway. With 168 registers `writes` and `reads_backward` spill
    0.25 KB at d = 64 on Hopper and three of them run at once; the other two that make or take
    writes would lose more, as ptxas then makes each matrix instruction wait for the one before. An
    A100, whose matrix instructions keep their operands in registers, would spill thrice as much by
    any of these. A program may have 227 KiB of shared memory (H100, H200) or 163 (A100); most has
    the backward pass of `pi`, 145 with two stages at d = 64, `inputs`, 128 at d = 128, and there
    on Hopper `pi` with two stages, 209: of its programs a multiprocessor seldom has two to do. The
    passes of `pi` spill 0.2 and 0.4 KB a thread at d = 64; at d = 128 most kernels spill about
    1 KB and `pi` backward 3: heads of 64 suit a GPU better.

    Args:
        d: dimension of a head.
        generation: major compute capability of the GPU.
    """
    own = _ON_HOPPER.get(d, {}) if generation >= _HOPPER else {}
    return {**_BY_HEAD[d], **own}


def takes(rules: MemoryRules, d: int, static: bool) -> bool:
    """Whether there are kernels for such a memory with heads of d, for bf16.

    In `SIZES`, for every memory but one that decays toward zero (`hope-paper`),
    which needs all of fp32; and for writes that erase and depend on tokens and Pi alone. One that
    does not decay has logits of 1e4 for its gate.
    """
    by_tokens = rules.erases and not rules.serial
    return by_tokens and (static or rules.anchored) and (rules.chunk, d) in SIZES


def supports(a: Tensor, b: Tensor, q: Tensor, rules: MemoryRules, static: bool) -> bool:
    """Whether the kernels take these inputs; where they do not, the torch form does.

    On a GPU they take bf16, and the memories that `takes` says. fp32 inputs stay with torch because
    tensor cores would round their products, and so do builds of torch that come without Triton.
    """
    import torch

    return (
        a.is_cuda
        and a.dtype == b.dtype == q.dtype == torch.bfloat16
        and takes(rules, a.shape[-1], static)
        and find_spec("triton") is not None
    )

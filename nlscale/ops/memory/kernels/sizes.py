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
    """How the kernels of one chunk and head size are launched."""

    warps: int
    pi_stages: int
    """Of the serial passes of Pi; 2: the tiles of the next chunk are fetched ahead."""
    columns: int
    """Of S, of d, that a program of the serial passes of S carries."""


_BY_HEAD = {
    16: Launch(warps=4, pi_stages=2, columns=16),
    32: Launch(warps=4, pi_stages=2, columns=32),
    64: Launch(warps=4, pi_stages=2, columns=64),
    128: Launch(warps=4, pi_stages=1, columns=64),
}
CHUNKS = (16, 32, 64)
LAUNCHES = {(chunk, d): launch for chunk in CHUNKS for d, launch in _BY_HEAD.items()}
"""By tokens of a chunk and dimension of a head.

Chosen by what the compiler says of sm_90 at chunk 64, not by measurements yet. Four warps make one
Hopper matrix instruction of 64 rows; eight would compute them twice. Shared memory is largest in
the backward pass of `pi`, 145 KiB with two stages at d = 64, and of `inputs`, 128 KiB at d = 128,
where two stages of `pi` would need 370; a multiprocessor has 227 (H100, H200) or 163 (A100). The
passes of `pi` spill 0.2 and 0.5 KB a thread at d = 64, the others next to nothing. At d = 128 most
spill about 1 KB and `pi` backward 4 KB: heads of 64 suit a GPU better.
"""


def takes(chunk: int, d: int, anchored: bool, static: bool) -> bool:
    """Whether there are kernels for such a memory, for bf16.

    In the sizes of `LAUNCHES`, for every memory but one that decays toward zero (`hope-paper`),
    which needs all of fp32.
    """
    return (static or anchored) and (chunk, d) in LAUNCHES


def supports(a: Tensor, b: Tensor, q: Tensor, rules: MemoryRules, static: bool) -> bool:
    """Whether the kernels take these inputs; where they do not, the torch form does.

    On a GPU they take bf16, and the memories that `takes` says. fp32 inputs stay with torch because
    tensor cores would round their products, and so do builds of torch that come without Triton.
    """
    import torch

    return (
        a.is_cuda
        and a.dtype == b.dtype == q.dtype == torch.bfloat16
        and takes(rules.chunk, a.shape[-1], rules.anchored, static)
        and find_spec("triton") is not None
    )

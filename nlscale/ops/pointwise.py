"""The small operations around the large ones: element by element, or along the channels of a token.

What limits them on a GPU is memory: run one by one, each reads and writes its tensors whole. There
`compiled_on_gpu` makes one or two kernels of each function below, which read their inputs once and
keep no more than these for the backward pass. On a CPU it takes `nlscale.ops.by_hand` in their
place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.ops import by_hand
from nlscale.ops.by_hand import wide as wide
from nlscale.ops.memory.rules import NORMALIZE_EPS

Function = TypeVar("Function", bound=Callable[..., Any])

_compile = cache(torch.compile)
"""Once a function, not once a layer that uses it."""


def compiled_on_gpu(function: Function, wanted: bool = True) -> Function:
    """`function`; if wanted, by way of `torch.compile` where a tensor it is given is on a GPU, and
    elsewhere with its derivative by hand where there is one."""
    if not wanted:
        return function
    on_cpu = _BY_HAND.get(function, function)

    @wraps(function)
    def run(*given: Any) -> Any:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in given)
        return (_compile(function) if on_gpu else on_cpu)(*given)

    return run  # type: ignore[return-value]


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last dimension, computed in at least fp32."""
    x_wide = x.to(wide(x))
    return (x_wide * torch.rsqrt(x_wide.square().sum(-1, keepdim=True) + NORMALIZE_EPS)).to(x.dtype)


def unit_mean_square(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) along the last dimension, computed in at least fp32."""
    x_wide = x.to(wide(x))
    return (x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[sequence, batch, heads * d] -> [batch, heads, sequence, d]."""
    length, batch, _ = x.shape
    return x.view(length, batch, heads, -1).permute(1, 2, 0, 3).contiguous()


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up of [gate | up], the halves of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_and_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and its RMSNorm along the last dimension.

    Apart, they would read the sum once more, and the backward pass the gradients of both.
    """
    total = x + update
    return total, F.rms_norm(total, weight.shape, weight, eps)


def convolve(x: Tensor, weight: Tensor, tail: Tensor, position: Tensor | None = None) -> Tensor:
    """SiLU of `short_convolution`."""
    return F.silu(short_convolution(x, weight, tail, position))


def short_convolution(
    x: Tensor, weight: Tensor, tail: Tensor, position: Tensor | None = None
) -> Tensor:
    """A causal depthwise convolution.

    Args:
        x: [sequence, batch, channels].
        weight: [window, channels]; the last row is of the token itself.
        tail: what came before x, [window - 1, batch, channels].
        position: tokens since the document of each began, [batch, sequence], where it sees none
            before these.
    """
    window, length = weight.shape[0], x.shape[0]
    padded = torch.cat([tail, x])
    mixed: Tensor | None = None
    for i in range(window):
        seen = padded[i : i + length]
        if position is not None:
            seen = torch.where((position >= window - 1 - i).T[..., None], seen, 0)
        mixed = seen * weight[i] if mixed is None else torch.addcmul(mixed, seen, weight[i])
    assert mixed is not None, "a window of at least one token"
    return mixed


def gated_read(
    read: Tensor, norm: Tensor | None, gate: Tensor | None, eps: float, sigmoid: bool = False
) -> Tensor:
    """RMSNorm(read) * SiLU(gate), each where there is one.

    Args:
        read: [batch, heads, sequence, d].
        norm: the weight of the norm, [heads, d].
        gate: [sequence, batch, heads * d].
        eps: added to the mean square.
        sigmoid: sigmoid(gate) in place of SiLU(gate).

    Returns:
        [sequence, batch, heads * d], in the dtype of `read`.
    """
    dtype = read.dtype
    if norm is not None:
        read = F.rms_norm(read, read.shape[-1:], None, eps) * norm[:, None]
    read = read.permute(2, 0, 1, 3).flatten(2).to(dtype)
    if gate is None:
        return read
    return read * (torch.sigmoid(gate) if sigmoid else F.silu(gate))


def scan_inputs(
    fed: Tensor,
    q: Tensor | None,
    weight: Tensor,
    tail: Tensor,
    position: Tensor | None,
    inputs: int,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a memory is fed with: a, b and unit queries, each [batch, heads, sequence, d].

    `fed` holds the inputs of a and b side by side, or one for both, and beside them, where q is
    None, those of the queries; weight, tail and position are those of the convolution.
    """
    fed = convolve(fed, weight, tail, position)
    if q is None:
        fed, q = fed.tensor_split([inputs * fed.shape[-1] // (inputs + 1)], dim=-1)
    a, *b = (by_head(part, heads) for part in fed.chunk(inputs, dim=-1))
    return unit_mean_square(a, eps), b[0] if b else a, normalize(by_head(q, heads))


def rotate(x: Tensor, base: float, first: int | Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, time, d], halves rotated together.

    Args:
        x: even d.
        base: of the wavelengths.
        first: position of the first token; of each row, int64 [batch], where they differ.
    """
    dtype = wide(x)
    cos, sin = by_hand.turns(x.shape[2], x.shape[3], base, first, dtype, x.device)
    left, right = x.to(dtype).chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    swiglu: by_hand.SwiGLU.apply,
    add_and_norm: by_hand.Norm.apply,
    gated_read: by_hand.GatedRead.apply,
    scan_inputs: by_hand.ScanInputs.apply,
    rotate: by_hand.Rotate.apply,
}

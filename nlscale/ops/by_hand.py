"""The small operations on a CPU, with their derivatives worked out by hand.

What limits them there is what they are made of: autograd runs a dozen operations of its own for a
norm, some of them slow, and keeps what is between. Each class here is a function of
`nlscale.ops.pointwise` (which says what is given and returned) as few passes over whatever the
cache holds; it keeps what it is given, and no more than one tensor of that size.

dY is the derivative of the loss by Y. All is computed in at least fp32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.memory.rules import NORMALIZE_EPS

silu_backward = torch.ops.aten.silu_backward
sigmoid_backward = torch.ops.aten.sigmoid_backward


def wide(x: Tensor) -> torch.dtype:
    """The precision of states, norms and gates: fp32, or that of x where it is more."""
    return torch.promote_types(x.dtype, torch.float32)


class Norm(torch.autograd.Function):
    """RMSNorm of x + update, and that sum; or of x alone.

    With u = x scale, scale = 1 / sqrt(mean(x^2) + eps), y = u weight and t = dy u:

        dweight = sum over tokens of t        dx = scale (dy weight - u (t . weight) / d)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | Tensor:
        total = x if update is None else x + update
        total_wide = total.to(wide(x))
        scale = _scale(total_wide, eps, mean=True)
        normed = (total_wide * scale).mul_(weight.to(scale.dtype)).to(x.dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.alone = update is None
        ctx.set_materialize_grads(False)
        return normed if update is None else (total, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        d_total, d_normed = (None, *d_outputs) if ctx.alone else d_outputs
        if d_normed is None:
            return d_total, None if ctx.alone else d_total, None, None
        unit, d_y, weight_wide = (
            total.to(scale.dtype) * scale,
            d_normed.to(scale.dtype),
            weight.to(scale.dtype),
        )
        size = unit.shape[-1]
        by_weight = d_y * unit
        d_weight = by_weight.reshape(-1, size).sum(0).to(weight.dtype)
        along = torch.mv(by_weight.reshape(-1, size), weight_wide).div_(-size).view(scale.shape)
        d_x = torch.mul(d_y, weight_wide, out=by_weight)
        d_x.addcmul_(unit, along).mul_(scale)
        d_x = (d_x if d_total is None else d_x.add_(d_total)).to(total.dtype)
        return d_x, None if ctx.alone else d_x, d_weight, None


class SwiGLU(torch.autograd.Function):
    """With s = SiLU(gate):  dgate = d up SiLU'(gate), dup = d s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(x, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        x, opened = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_up = d_x.chunk(2, dim=-1)
        torch.mul(d, opened, out=d_up)
        silu_backward(d * up, gate, grad_input=d_gate)
        return d_x


class Rotate(torch.autograd.Function):
    """The derivative is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: float, first: int | Tensor) -> Tensor:
        ctx.by = base, first
        return _rotated(x, *_turns_on_cpu(x, base, first), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(d, *_turns_on_cpu(d, *ctx.by), -1), None, None


class GatedRead(torch.autograd.Function):
    """With u = read scale, n = u norm, s = SiLU(gate), y = n s:

    dn = dy s        dgate = dy n SiLU'(gate)        dnorm = sum over tokens of dn u
    dread = scale (dn norm - u (dn norm . u) / d)

    The same with sigmoid in the place of SiLU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        read: Tensor,
        norm: Tensor | None,
        gate: Tensor | None,
        eps: float,
        sigmoid: bool = False,
    ) -> Tensor:
        batch, heads, length, d = read.shape
        out = _contiguous(read.permute(2, 0, 1, 3), wide(read))
        scale = None if norm is None else _scale(out, eps, mean=True)
        ctx.save_for_backward(out, norm, gate, scale)
        ctx.dtype, ctx.sigmoid = read.dtype, sigmoid
        if norm is not None and scale is not None:
            out = (out * scale).mul_(norm.to(out.dtype))
        if gate is not None:
            opens = torch.sigmoid if sigmoid else F.silu
            out = out * opens(gate.to(out.dtype)).view(out.shape)
        return out.reshape(length, batch, heads * d).to(read.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        read, norm, gate, scale = ctx.saved_tensors
        unit = read if norm is None else read * scale
        d_read, d_norm, d_gate = d_out.view(unit.shape).to(unit.dtype), None, None
        if gate is not None:
            normed = unit if norm is None else unit * norm
            gate_wide = gate.to(unit.dtype).view(unit.shape)
            opened = torch.sigmoid(gate_wide) if ctx.sigmoid else F.silu(gate_wide)
            backward = sigmoid_backward if ctx.sigmoid else silu_backward
            by = opened if ctx.sigmoid else gate_wide
            d_gate = backward(normed * d_read, by).to(gate.dtype).view(gate.shape)
            d_read = d_read * opened
        if norm is not None:
            d_norm = (d_read * unit).sum((0, 1)).to(norm.dtype)
            d_read = _scale_backward(d_read * norm, unit, scale, unit.shape[-1])
        return d_read.permute(1, 2, 0, 3).to(ctx.dtype), d_norm, d_gate, None, None


class ScanInputs(torch.autograd.Function):
    """a, b and q of the scan in at least fp32, since it takes them so.

    With m the convolution, s = SiLU(m), a = s scale:

        ds = scale (da - a (da . a) / d)  [ + db ]        dm = ds SiLU'(m)
        dweight_i = sum over tokens of dm seen_i          dfed = sum_i of dm weight_i, moved by i

    A norm's derivative needs only what it has returned, which the scan keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, fed: Tensor, q: Tensor | None, weight: Tensor, tail: Tensor,
        position: Tensor | None, inputs: int, heads: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mixed = None
        for seen, row in zip(_seen(fed, weight, tail, position), weight.to(wide(fed)), strict=True):
            mixed = seen * row if mixed is None else mixed.addcmul_(seen, row)
        assert mixed is not None, "a window of at least one token"
        ctx.sections, ctx.dtype = inputs + (q is None), fed.dtype
        of_keys, *of_values = F.silu(mixed).chunk(ctx.sections, dim=-1)
        if q is None:
            q = of_values.pop()
        a, q_by_head = _by_head(of_keys, heads, mixed.dtype), _by_head(q, heads, mixed.dtype)
        b = _by_head(of_values[0], heads, mixed.dtype) if of_values else a
        a_scale, q_scale = _scale(a, eps, mean=True), _scale(q_by_head, NORMALIZE_EPS, mean=False)
        a, q_unit = a * a_scale, q_by_head * q_scale
        ctx.save_for_backward(fed, weight, tail, position, mixed, a, q_unit, a_scale, q_scale)
        ctx.inputs = inputs
        return a, b, q_unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_a: Tensor, d_b: Tensor, d_q: Tensor) -> tuple[Tensor | None, ...]:
        fed, weight, tail, position, mixed, a, q, a_scale, q_scale = ctx.saved_tensors
        length, batch, _ = fed.shape
        heads, d = a.shape[1], a.shape[3]
        d_q = _scale_backward(d_q, q, q_scale, 1)
        d_s = torch.empty_like(mixed)
        # [batch, heads, time, d] of keys, of values and of queries, in their places
        parts = d_s.view(length, batch, ctx.sections, heads, d).permute(2, 1, 3, 0, 4)
        parts[0] = _scale_backward(d_a, a, a_scale, d)
        if ctx.inputs == 2:
            parts[1] = d_b
        else:
            parts[0] += d_b
        d_alone = None
        if ctx.sections > ctx.inputs:
            parts[-1] = d_q
        else:
            d_alone = _contiguous(d_q.permute(2, 0, 1, 3), ctx.dtype).view(length, batch, -1)
        d_mixed = silu_backward(d_s, mixed, grad_input=d_s)
        window, d_weight = len(weight), []
        d_padded = d_mixed.new_zeros(length + window - 1, *d_mixed.shape[1:])
        weights = weight.to(d_mixed.dtype)
        for i, seen in enumerate(_seen(fed, weight, tail, position)):
            d_weight.append((seen * d_mixed).sum((0, 1)))
            d_seen = d_mixed
            if position is not None:
                d_seen = d_seen * _visible(position, window - 1 - i)
            d_padded[i : i + length].addcmul_(d_seen, weights[i])
        d_tail, d_fed = d_padded.to(fed.dtype).split([window - 1, length])
        d_weights = torch.stack(d_weight).to(weight.dtype)
        return d_fed, d_alone, d_weights, d_tail, None, None, None, None


def _seen(fed: Tensor, weight: Tensor, tail: Tensor, position: Tensor | None) -> list[Tensor]:
    """What each row of a convolution's weight is multiplied by, in at least fp32."""
    window, length = len(weight), len(fed)
    padded = fed.new_empty(length + window - 1, *fed.shape[1:], dtype=wide(fed))
    padded[: window - 1], padded[window - 1 :] = tail, fed
    seen = [padded[i : i + length] for i in range(window)]
    if position is None:
        return seen
    return [x * _visible(position, window - 1 - i) for i, x in enumerate(seen)]


def _visible(position: Tensor, back: int) -> Tensor:
    """1 for tokens whose document has that many before them, else 0; [sequence, batch, 1]."""
    return (position >= back).T[..., None]


def _by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """As `nlscale.ops.pointwise.by_head`, of views too."""
    return _contiguous(x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3), dtype)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass; `x.to` would keep the order of a permuted x."""
    return x.contiguous() if x.dtype == dtype else x.new_empty(x.shape, dtype=dtype).copy_(x)


def _scale(x: Tensor, eps: float, mean: bool) -> Tensor:
    """1 / sqrt(|x|^2 + eps), or of the mean of the squares, along the last dimension."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return (square.div_(x.shape[-1]) if mean else square).add_(eps).rsqrt_()


def _scale_backward(d_unit: Tensor, unit: Tensor, scale: Tensor, size: int) -> Tensor:
    """Derivative by x of unit = x scale, where scale is of the sum of the squares over size."""
    along = (d_unit * unit).sum(-1, keepdim=True).div_(-size)
    return torch.addcmul(d_unit, unit, along).mul_(scale)


def _turns_on_cpu(x: Tensor, base: float, first: int | Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens of x, [batch, heads, time, d]."""
    make = turns if isinstance(first, Tensor) else _kept_turns
    return make(x.shape[2], x.shape[3], base, first, wide(x), torch.device("cpu"))


@lru_cache(maxsize=4)
def _kept_turns(*of: Any) -> tuple[Tensor, Tensor]:
    """The same for all layers."""
    return turns(*of)


def turns(
    length: int,
    d: int,
    base: float,
    first: int | Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of some tokens, [time, d / 2] or, by row, [batch, 1, time, d / 2].

    `first` is the position of the first, of each row, [batch], where they differ.
    """
    half = d // 2
    frequency = base ** (-torch.arange(half, device=device, dtype=dtype) / half)
    if isinstance(first, Tensor):
        begin = first.to(device=device, dtype=dtype)[:, None, None, None]
        angle = (begin + torch.arange(length, device=device, dtype=dtype)[:, None]) * frequency
    else:
        time = torch.arange(first, first + length, device=device, dtype=dtype)
        angle = time[:, None] * frequency
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Pairs of the halves of x, [batch, heads, time, d], turned by angles or back."""
    x_wide = _contiguous(x, cos.dtype)
    left, right = x_wide.chunk(2, dim=-1)
    out = x_wide * torch.cat([cos, cos], dim=-1)
    out_left, out_right = out.chunk(2, dim=-1)
    out_left.addcmul_(right, sin, value=-sign)
    out_right.addcmul_(left, sin, value=sign)
    return out.to(x.dtype)

"""What the kernels share: tiles in and out, products, and the parts of a chunk.

The notation is that of `nlscale.ops.memory.chunk`. A tile is the rows of one chunk of one sequence
and head (a "sequence" here), fp32 [C, D] in registers whatever it is in memory; rows beyond the end
of the sequence are zero, and write nothing. Operands of products are rounded to `LOW`, the dtype of
the inputs, and added up in fp32; where `LOW` is fp32 the products are IEEE ones.

Triton would compile a kernel anew for integers that are 1 or divisible by 16. Kernels are told not
to: one binary serves every length and batch, the one that was checked. Only `writes` knows whether
the length is, without which it spills more at d = 128.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import math

import triton
import triton.language as tl

from nlscale.ops.memory.kernels.inverse import unit_lower_inverse
from nlscale.ops.memory.rules import NORMALIZE_EPS

_EPS = tl.constexpr(NORMALIZE_EPS)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def chunk_and_sequence(chunks):
    """Of a program, one a chunk, sequence and head.

    All are counted along the first axis of the grid, which has room for 2^31: the others end at
    65,535, which batch times heads may exceed. Neighbours are the chunks of one sequence: they run
    at the same time, read memory that lies together, and share what the head has learned in L2.
    """
    program = tl.program_id(0)
    return program % chunks, program // chunks


@triton.jit
def load_tile(tensor, sequence, chunk, length, C: tl.constexpr, D: tl.constexpr):
    """Of [sequences, length, D]."""
    token = chunk * C + tl.arange(0, C)[:, None]
    offset = (sequence.to(tl.int64) * length + token) * D + tl.arange(0, D)[None, :]
    return tl.load(tensor + offset, mask=token < length, other=0.0).to(tl.float32)


@triton.jit
def store_tile(tensor, tile, sequence, chunk, length, C: tl.constexpr, D: tl.constexpr):
    token = chunk * C + tl.arange(0, C)[:, None]
    offset = (sequence.to(tl.int64) * length + token) * D + tl.arange(0, D)[None, :]
    tl.store(tensor + offset, tile.to(tensor.dtype.element_ty), mask=token < length)


@triton.jit
def load_column(tensor, sequence, chunk, length, C: tl.constexpr):
    """One number a token, of [sequences, length]."""
    token = chunk * C + tl.arange(0, C)
    offset = sequence.to(tl.int64) * length + token
    return tl.load(tensor + offset, mask=token < length, other=0.0).to(tl.float32)


@triton.jit
def store_column(tensor, column, sequence, chunk, length, C: tl.constexpr):
    token = chunk * C + tl.arange(0, C)
    offset = sequence.to(tl.int64) * length + token
    tl.store(tensor + offset, column, mask=token < length)


@triton.jit
def load_square(tensor, index, D: tl.constexpr):
    """Of [any number, D, D]."""
    cell = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(tensor + index.to(tl.int64) * (D * D) + cell).to(tl.float32)


@triton.jit
def store_square(tensor, square, index, D: tl.constexpr):
    cell = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(tensor + index.to(tl.int64) * (D * D) + cell, square.to(tensor.dtype.element_ty))


@triton.jit
def load_vector(tensor, index, D: tl.constexpr):
    """A row [1, D] of [any number, D]."""
    return tl.load(tensor + index * D + tl.arange(0, D))[None, :].to(tl.float32)


@triton.jit
def unit(chunk, D: tl.constexpr):
    """I. Made anew in each chunk: the compiler would keep it in registers from before the loop."""
    row = chunk * D + tl.arange(0, D)
    return tl.where(row[:, None] ^ row[None, :] == 0, 1.0, 0.0)


@triton.jit
def dot(x, y, LOW: tl.constexpr):
    """x y."""
    return tl.dot(x.to(LOW), y.to(LOW), input_precision="ieee")


@triton.jit
def dot_nt(x, y, LOW: tl.constexpr):
    """x y^T."""
    return tl.dot(x.to(LOW), tl.trans(y.to(LOW)), input_precision="ieee")


@triton.jit
def dot_tn(x, y, LOW: tl.constexpr):
    """x^T y."""
    return tl.dot(tl.trans(x.to(LOW)), y.to(LOW), input_precision="ieee")


@triton.jit
def inverse_norm(x):
    return tl.rsqrt(tl.sum(x * x, 1) + _EPS)


@triton.jit
def normalize_backward(d_unit, unit, scale):
    """Derivative by x of unit = x scale, scale = 1 / sqrt(|x|^2 + eps)."""
    return (d_unit - unit * tl.sum(unit * d_unit, 1)[:, None]) * scale[:, None]


@triton.jit
def make_keys(
    a, eta, alpha, pi, for_key, for_gates, sequence, chunk, length, heads,
    C: tl.constexpr, D: tl.constexpr, PI: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    """k, its 1 / |x|, and the logits of eta and alpha, given Pi at the start of the chunk."""
    LOW: tl.constexpr = a.dtype.element_ty
    head = sequence % heads
    x = load_tile(a, sequence, chunk, length, C, D)
    eta_logit = load_column(eta, sequence, chunk, length, C)
    alpha_logit = load_column(alpha, sequence, chunk, length, C)
    if PI:
        from_a = dot_nt(x, pi, LOW)
        made = dot_nt(from_a, load_square(for_key, head, D), LOW)
        x = x + made if ADDITIVE else made
        eta_logit += tl.sum(from_a * load_vector(for_gates, 2 * head, D), 1)
        alpha_logit += tl.sum(from_a * load_vector(for_gates, 2 * head + 1, D), 1)
    scale = inverse_norm(x)
    return x * scale[:, None], scale, eta_logit, alpha_logit


@triton.jit
def make_values(
    b, pi, for_value, sequence, chunk, length, heads,
    C: tl.constexpr, D: tl.constexpr, PI: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = b.dtype.element_ty
    v = load_tile(b, sequence, chunk, length, C, D)
    if PI:
        made = dot_nt(dot_nt(v, pi, LOW), load_square(for_value, sequence % heads, D), LOW)
        v = v + made if ADDITIVE else made
    return v


@triton.jit
def log_decay(alpha_logit, token, length):
    """log2 sigmoid of the logit, for each token; 0 beyond the end.

    Decays and their sums g are binary logarithms, because exp2 is what a GPU has.
    """
    logit = alpha_logit * _LOG2_E
    logarithm = tl.minimum(logit, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(logit)))
    return tl.where(token < length, logarithm, 0.0)


@triton.jit
def gates_of(
    eta_logit, alpha_logit, token, length, STRENGTH: tl.constexpr, DECAYED: tl.constexpr
):  # fmt: skip
    """Of a chunk: r, the log decays g until after each token and those by which what a write erases
    has decayed (if DECAYED, g too; else until before the token), and that of the whole chunk."""
    decay = log_decay(alpha_logit, token, length)
    g = tl.cumsum(decay)
    before = g if DECAYED else g - decay
    return STRENGTH * tl.sigmoid(eta_logit), g, before, tl.sum(decay)


@triton.jit
def fade(after, until, token, strict: tl.constexpr):
    """2^(after_i - until_j) where i > j, or i >= j if not strict; else 0."""
    i = token[:, None]
    j = token[None, :]
    seen = i > j if strict else i >= j
    return tl.exp2(tl.where(seen, after[:, None] - until[None, :], float("-inf")))


@triton.jit
def solution(
    k, r, g, before, token, LOW: tl.constexpr, C: tl.constexpr, STRENGTH: tl.constexpr
):  # fmt: skip
    """T = (I + diag(r) W)^-1; g and before as `gates_of` gives them.

    A strength near 2 reflects, and rounding errors of T do not fade from one write to the next.
    """
    coupling = dot_nt(k, k, LOW) * fade(before, g, token, True) * r[:, None]
    return unit_lower_inverse(coupling, token, LOW, STRENGTH > 1, C)


@triton.jit
def write_pi(
    v, k, faded, r, pi, solve,
    LOW: tl.constexpr, UNIT_VALUE: tl.constexpr, KEY_SHARE: tl.constexpr,
):  # fmt: skip
    """The rows of D that are Pi's (anchored); KEY_SHARE is the c of the rules."""
    target = v * inverse_norm(v)[:, None] if UNIT_VALUE else v
    right = dot_nt(target - KEY_SHARE * k - faded, pi, LOW) + faded - k
    return dot(solve, right * r[:, None], LOW)

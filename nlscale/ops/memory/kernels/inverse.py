"""The inverse of the triangular system of a chunk, inside a kernel."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_lower_inverse(
    lower, token, LOW: tl.constexpr, FINE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """(I + L)^-1 for strictly lower triangular L, fp32 [C, C]; C is 16, 32 or 64.

    Masked block doubling: with X the inverse of the diagonal blocks of size b, and L_b what
    couples the halves of the blocks of size 2b,  X - X L_b X  is the inverse of the latter. Every
    X holds entries of the result, bounded by the strength of the writes, which expand nothing, so
    that operands of products may be rounded to `LOW`; if FINE, not to bf16 but TF32, eight times as
    finely. The product (I - L)(I + L^2)(I + L^4) ... is shorter, but powers of L are huge where the
    keys of a chunk are alike.
    """
    OPERAND: tl.constexpr = tl.float32 if FINE else LOW
    PRECISION: tl.constexpr = "tf32" if FINE and tl.float32 != LOW else "ieee"
    highest = token[:, None] ^ token[None, :]  # its highest bit: the level at which the two part
    inverse = tl.where(highest == 0, 1.0, 0.0) - tl.where(highest == 1, lower, 0.0)
    for level in tl.static_range(1, 6):
        if 2**level < C:
            between = tl.where(highest // 2**level == 1, lower, 0.0)
            low = inverse.to(OPERAND)
            product = tl.dot(low, between.to(OPERAND), input_precision=PRECISION)
            inverse -= tl.dot(product.to(OPERAND), low, input_precision=PRECISION)
    return inverse

"""From the derivatives of x, v and the logits to those of a, b and the learned memories."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from nlscale.ops.memory.kernels.chunk import (
    dot,
    dot_nt,
    dot_tn,
    load_column,
    load_square,
    load_tile,
    load_vector,
    store_square,
    store_tile,
)


@triton.jit(do_not_specialize=["length", "chunks", "heads", "chunks_each"])
def inputs_backward_kernel(
    a, b, for_key, for_value, for_gates, states, d_x, d_v, d_eta, d_alpha,
    d_a, d_b, d_for_key, d_for_value, d_for_gates,
    length, chunks, heads, chunks_each,
    C: tl.constexpr, D: tl.constexpr, ADDITIVE: tl.constexpr,
):  # fmt: skip
    """One program some chunks of a sequence and head; only where there is a Pi.

    The derivatives of the learned memories are sums over these chunks, fp32
    [sequences, programs a sequence, D or 2, D], still to be added up.
    """
    LOW: tl.constexpr = a.dtype.element_ty
    program, parts = tl.program_id(0), tl.cdiv(chunks, chunks_each)
    part, sequence = program % parts, program // parts
    head = sequence % heads
    key, value = load_square(for_key, head, D), load_square(for_value, head, D)
    for_eta = load_vector(for_gates, 2 * head, D)
    for_alpha = load_vector(for_gates, 2 * head + 1, D)
    of_key = tl.zeros((D, D), tl.float32)
    of_value = tl.zeros((D, D), tl.float32)
    of_eta = tl.zeros((D,), tl.float32)
    of_alpha = tl.zeros((D,), tl.float32)
    first = part * chunks_each
    for chunk in range(first, tl.minimum(first + chunks_each, chunks)):
        pi = load_square(states, sequence * chunks + chunk, D)
        d_made_k = load_tile(d_x, sequence, chunk, length, C, D)
        d_eta_logit = load_column(d_eta, sequence, chunk, length, C)[:, None]
        d_alpha_logit = load_column(d_alpha, sequence, chunk, length, C)[:, None]
        from_a = dot_nt(load_tile(a, sequence, chunk, length, C, D), pi, LOW)
        of_key += dot_tn(d_made_k, from_a, LOW)
        of_eta += tl.sum(d_eta_logit * from_a, 0)
        of_alpha += tl.sum(d_alpha_logit * from_a, 0)
        d_from_a = dot(d_made_k, key, LOW) + d_eta_logit * for_eta + d_alpha_logit * for_alpha
        d_input = dot(d_from_a, pi, LOW)
        store_tile(d_a, d_input + d_made_k if ADDITIVE else d_input, sequence, chunk, length, C, D)

        d_made_v = load_tile(d_v, sequence, chunk, length, C, D)
        from_b = dot_nt(load_tile(b, sequence, chunk, length, C, D), pi, LOW)
        of_value += dot_tn(d_made_v, from_b, LOW)
        d_input = dot(dot(d_made_v, value, LOW), pi, LOW)
        store_tile(d_b, d_input + d_made_v if ADDITIVE else d_input, sequence, chunk, length, C, D)
    store_square(d_for_key, of_key, program, D)
    store_square(d_for_value, of_value, program, D)
    row = tl.arange(0, D)
    tl.store(d_for_gates + program * 2 * D + row, of_eta)
    tl.store(d_for_gates + (program * 2 + 1) * D + row, of_alpha)

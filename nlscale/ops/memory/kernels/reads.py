"""What the queries read, all chunks at once, from S or, without one, from Pi."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from nlscale.ops.memory.kernels.chunk import (
    chunk_and_sequence,
    dot,
    dot_nt,
    dot_tn,
    fade,
    load_column,
    load_square,
    load_tile,
    log_decay,
    store_column,
    store_square,
    store_tile,
)


@triton.jit(do_not_specialize=["length", "chunks"])
def reads_kernel(
    q, key, write, alpha_logits, states, reads,
    length, chunks,
    C: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
):  # fmt: skip
    """One program a chunk, sequence and head:  Y = exp(g) q Z^T + A D  [ + (1 - exp(g)) q ].

    states: of S they are transposed, of Pi not.
    """
    LOW: tl.constexpr = key.dtype.element_ty
    chunk, sequence = chunk_and_sequence(chunks)
    token = chunk * C + tl.arange(0, C)
    alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
    g = tl.cumsum(log_decay(alpha_logit, token, length))
    since_start = tl.exp2(g)[:, None]
    state = load_square(states, sequence * chunks + chunk, D)
    written = load_tile(write, sequence, chunk, length, C, D)
    query = load_tile(q, sequence, chunk, length, C, D)
    k = load_tile(key, sequence, chunk, length, C, D)
    scores = dot_nt(query, k, LOW) * fade(g, g, token, False)
    if MAIN:
        read = dot(query, state, LOW) * since_start
    else:
        read = dot_nt(query, state, LOW) * since_start + query * (1.0 - since_start)
    store_tile(reads, read + dot(scores, written, LOW), sequence, chunk, length, C, D)


@triton.jit(do_not_specialize=["length", "chunks"])
def reads_backward_kernel(
    q, key, write, solve, alpha_logits, states, d_reads,
    d_q, d_key, d_write, d_state, d_decay,
    length, chunks,
    C: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
):  # fmt: skip
    """The derivatives of all that is read with; one program a chunk, sequence and head.

    d_write is dD of S, or T^T dD of Pi, whose pass wants it so; d_state is dS^T or dPi at the start
    of the chunk; d_decay that of log alpha. See `nlscale.ops.memory.reads` for the formulas.
    """
    LOW: tl.constexpr = key.dtype.element_ty
    chunk, sequence = chunk_and_sequence(chunks)
    token = chunk * C + tl.arange(0, C)
    alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
    g = tl.cumsum(log_decay(alpha_logit, token, length))
    seen = fade(g, g, token, False)
    state = load_square(states, sequence * chunks + chunk, D)
    written = load_tile(write, sequence, chunk, length, C, D)
    query = load_tile(q, sequence, chunk, length, C, D)
    k = load_tile(key, sequence, chunk, length, C, D)
    d_read = load_tile(d_reads, sequence, chunk, length, C, D)
    d_faded = d_read * tl.exp2(g)[:, None]

    scores = dot_nt(query, k, LOW) * seen
    from_reads = dot_tn(scores, d_read, LOW)
    if not MAIN:
        from_reads = dot_tn(load_tile(solve, sequence, chunk, length, C, C), from_reads, LOW)
    store_tile(d_write, from_reads, sequence, chunk, length, C, D)
    d_scores = dot_nt(d_read, written, LOW) * seen
    d_k = dot_tn(d_scores, query, LOW)
    store_tile(d_key, d_k, sequence, chunk, length, C, D)
    if MAIN:
        store_square(d_state, dot_tn(query, d_faded, LOW), sequence * chunks + chunk, D)
        d_query = dot_nt(d_faded, state, LOW) + dot(d_scores, k, LOW)
    else:
        store_square(d_state, dot_tn(d_faded, query, LOW), sequence * chunks + chunk, D)
        d_query = dot(d_faded, state, LOW) + dot(d_scores, k, LOW) - d_faded
    d_g = tl.sum(query * d_query, 1) - tl.sum(k * d_k, 1)
    store_column(d_decay, tl.cumsum(d_g, reverse=True), sequence, chunk, length, C)
    if not MAIN:
        d_query += d_read
    store_tile(d_q, d_query, sequence, chunk, length, C, D)

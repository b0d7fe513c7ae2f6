"""What the chunks write, all at once, each made anew from Pi at its start."""

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
    gates_of,
    load_column,
    load_square,
    load_tile,
    make_keys,
    make_values,
    normalize_backward,
    solution,
    store_column,
    store_tile,
    write_pi,
)


@triton.jit(do_not_specialize=["chunks", "heads"])
def writes_kernel(
    a, b, eta, alpha, for_key, for_value, for_gates, pi_states, main_states,
    key, write, from_state, alpha_logits,
    key_scale, eta_logits, pi_write, value, spread, solve,
    length, chunks, heads,
    C: tl.constexpr, D: tl.constexpr, PI: tl.constexpr, MAIN: tl.constexpr,
    ADDITIVE: tl.constexpr, UNIT_VALUE: tl.constexpr, KEY_SHARE: tl.constexpr,
    STRENGTH: tl.constexpr, DECAYED: tl.constexpr, FOR_BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program a chunk, sequence and head.

    Leaves k, the logits of alpha, and D of the memory that is read, `write`. Forward, S is not
    known yet: `write` is then what does not depend on it, and `from_state` what does, of
    D = T diag(r) v - (T diag(r) f) S^T. The backward pass also wants 1 / |x|, the logits of eta and
    T, and of Pi its D beside S's, v and T^T n (`spread`).
    """
    LOW: tl.constexpr = a.dtype.element_ty
    chunk, sequence = chunk_and_sequence(chunks)
    pi = load_square(pi_states, sequence * chunks + chunk, D) if PI else None
    k, scale, eta_logit, alpha_logit = make_keys(
        a, eta, alpha, pi, for_key, for_gates, sequence, chunk, length, heads, C, D, PI, ADDITIVE
    )
    store_tile(key, k, sequence, chunk, length, C, D)
    store_column(alpha_logits, alpha_logit, sequence, chunk, length, C)
    token = chunk * C + tl.arange(0, C)
    r, g, before, whole = gates_of(eta_logit, alpha_logit, token, length, STRENGTH, DECAYED)
    inverse = solution(k, r, g, before, token, LOW, C, STRENGTH)
    v = make_values(b, pi, for_value, sequence, chunk, length, heads, C, D, PI, ADDITIVE)
    faded = k * tl.exp2(before)[:, None]
    if MAIN:
        by_state = dot(inverse, faded * r[:, None], LOW)
        store_tile(from_state, by_state, sequence, chunk, length, C, D)
        written = dot(inverse, v * r[:, None], LOW)
        if FOR_BACKWARD:
            main = load_square(main_states, sequence * chunks + chunk, D)
            written -= dot(by_state, main, LOW)
        store_tile(write, written, sequence, chunk, length, C, D)
    if PI and (FOR_BACKWARD or not MAIN):
        written = write_pi(v, k, faded, r, pi, inverse, LOW, UNIT_VALUE, KEY_SHARE)
        store_tile(pi_write if MAIN else write, written, sequence, chunk, length, C, D)
    if FOR_BACKWARD:
        store_column(key_scale, scale, sequence, chunk, length, C)
        store_column(eta_logits, eta_logit, sequence, chunk, length, C)
        store_tile(solve, inverse, sequence, chunk, length, C, C)
        if PI:
            store_tile(value, v, sequence, chunk, length, C, D)
            left = k * tl.exp2(whole - g)[:, None]
            store_tile(spread, dot_tn(inverse, left, LOW), sequence, chunk, length, C, D)


@triton.jit(do_not_specialize=["length", "chunks"])
def writes_backward_kernel(
    key, key_scale, write, solve, states, eta_logits, alpha_logits,
    d_write, d_after, d_key, d_decay, d_value, d_r,
    length, chunks,
    C: tl.constexpr, D: tl.constexpr, PI: tl.constexpr,
    STRENGTH: tl.constexpr, DECAYED: tl.constexpr,
):  # fmt: skip
    """Of what is written to S; one program a chunk, sequence and head.

    From dD (`d_write`) and dS after the chunk (`d_after`) to the derivatives of k, v, r and log
    alpha: those of k and log alpha are added to what the reads have left there. Without Pi nothing
    else depends on these, and those of x and of the logits take the place of k's, r's and log
    alpha's. States and their derivatives are transposed.
    """
    LOW: tl.constexpr = key.dtype.element_ty
    chunk, sequence = chunk_and_sequence(chunks)
    token = chunk * C + tl.arange(0, C)
    eta_logit = load_column(eta_logits, sequence, chunk, length, C)
    alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
    r, g, before, whole = gates_of(eta_logit, alpha_logit, token, length, STRENGTH, DECAYED)
    k = load_tile(key, sequence, chunk, length, C, D)
    state = load_square(states, sequence * chunks + chunk, D)
    after = load_square(d_after, sequence * chunks + chunk, D)
    written = load_tile(write, sequence, chunk, length, C, D)

    inverse = load_tile(solve, sequence, chunk, length, C, C)
    w = dot_tn(inverse, load_tile(d_write, sequence, chunk, length, C, D), LOW)
    d_strength = tl.sum(w * written, 1)
    w *= r[:, None]
    store_tile(d_value, w, sequence, chunk, length, C, D)
    past = dot_nt(written, after, LOW) * tl.exp2(whole - g)[:, None]
    d_end = tl.exp2(whole) * tl.sum(state * after) + tl.sum(k * past)
    pairs = -dot_nt(w, written, LOW) * fade(before, g, token, True)
    past += dot_tn(pairs, k, LOW)
    now = dot(pairs, k, LOW) - dot_nt(w, state, LOW) * tl.exp2(before)[:, None]
    by_past, by_now = tl.sum(k * past, 1), tl.sum(k * now, 1)
    d_log = tl.cumsum(by_now - by_past, reverse=True) + d_end
    if not DECAYED:
        d_log -= by_now
    d_log += load_column(d_decay, sequence, chunk, length, C)
    d_k = load_tile(d_key, sequence, chunk, length, C, D) + past + now
    if not PI:
        d_k = normalize_backward(d_k, k, load_column(key_scale, sequence, chunk, length, C))
        d_strength *= 1.0 - r / STRENGTH
        d_log *= tl.sigmoid(-alpha_logit)
    store_tile(d_key, d_k, sequence, chunk, length, C, D)
    store_column(d_r, d_strength, sequence, chunk, length, C)
    store_column(d_decay, d_log, sequence, chunk, length, C)

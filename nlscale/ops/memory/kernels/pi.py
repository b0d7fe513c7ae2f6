"""The serial passes of Pi, which makes keys, values and gates: one program a sequence and head.

Pi, and backward its derivative, stays in registers in fp32.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from nlscale.ops.memory.kernels.chunk import (
    dot,
    dot_nt,
    dot_tn,
    fade,
    gates_of,
    inverse_norm,
    load_column,
    load_square,
    load_tile,
    load_vector,
    make_keys,
    make_values,
    normalize_backward,
    solution,
    store_column,
    store_square,
    store_tile,
    unit,
    write_pi,
)


@triton.jit(do_not_specialize=["length", "chunks", "heads"])
def pi_kernel(
    a, b, eta, alpha, for_key, for_value, for_gates, current, carried, states, last,
    length, chunks, heads,
    C: tl.constexpr, D: tl.constexpr, ADDITIVE: tl.constexpr, UNIT_VALUE: tl.constexpr,
    KEY_SHARE: tl.constexpr, STRENGTH: tl.constexpr, DECAYED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """current, last: [sequences, D, D], fp32; states, at the start of chunks: [sequences, chunks,
    D, D]; carried: if DOCUMENTS, 0 at chunks before which Pi starts anew, else 1, [batch, chunks].
    """
    LOW: tl.constexpr = a.dtype.element_ty
    sequence = tl.program_id(0)
    pi = load_square(current, sequence, D)
    for chunk in range(chunks):
        if DOCUMENTS:
            carry = tl.load(carried + sequence // heads * chunks + chunk)
            pi = (pi - unit(chunk, D)) * carry + unit(chunk, D)
        store_square(states, pi, sequence * chunks + chunk, D)
        k, _, eta_logit, alpha_logit = make_keys(
            a, eta, alpha, pi, for_key, for_gates, sequence, chunk, length, heads,
            C, D, True, ADDITIVE,
        )  # fmt: skip
        token = chunk * C + tl.arange(0, C)
        r, g, before, whole = gates_of(eta_logit, alpha_logit, token, length, STRENGTH, DECAYED)
        solve = solution(k, r, g, before, token, LOW, C, STRENGTH)
        v = make_values(b, pi, for_value, sequence, chunk, length, heads, C, D, True, ADDITIVE)
        faded = k * tl.exp2(before)[:, None]
        write = write_pi(v, k, faded, r, pi, solve, LOW, UNIT_VALUE, KEY_SHARE)
        pi = (pi - unit(chunk, D)) * tl.exp2(whole) + unit(chunk, D)
        pi += dot_tn(write, k * tl.exp2(whole - g)[:, None], LOW)
    store_square(last, pi, sequence, D)


@triton.jit(do_not_specialize=["length", "chunks", "heads"])
def pi_backward_kernel(
    a, b, for_key, for_value, for_gates, states,
    key, key_scale, value, write, spread, eta_logits, alpha_logits,
    d_key, d_value, d_write, d_r, d_decay, d_state, d_last, carried,
    d_x, d_v, d_eta, d_alpha, d_current,
    length, chunks, heads,
    C: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, UNIT_VALUE: tl.constexpr,
    KEY_SHARE: tl.constexpr, STRENGTH: tl.constexpr, DECAYED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """From the derivatives of k and log alpha and, if MAIN, v and r, as reads and S leave them, to
    those of x, v and the logits. If not MAIN, what is read is Pi: d_write is then T^T dD and
    d_state dPi, as the reads leave them.

    y = (T^T n) dPi'^T + T^T dD, and dg_C by  Pi' . dPi' = exp(g_C) Pi . dPi' + sum n . (D dPi') +
    (1 - exp(g_C)) trace dPi'; for the rest see `nlscale.ops.memory.chunk`.
    """
    LOW: tl.constexpr = a.dtype.element_ty
    sequence = tl.program_id(0)
    head = sequence % heads
    d_pi = load_square(d_last, sequence, D)
    for step in range(chunks):
        chunk = chunks - 1 - step
        token = chunk * C + tl.arange(0, C)
        eta_logit = load_column(eta_logits, sequence, chunk, length, C)
        alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
        r, g, before, whole = gates_of(eta_logit, alpha_logit, token, length, STRENGTH, DECAYED)
        k = load_tile(key, sequence, chunk, length, C, D)
        pi = load_square(states, sequence * chunks + chunk, D)
        written = load_tile(write, sequence, chunk, length, C, D)

        # the triangular system
        w = dot_nt(load_tile(spread, sequence, chunk, length, C, D), d_pi, LOW)
        if not MAIN:
            w += load_tile(d_write, sequence, chunk, length, C, D)
        d_strength = tl.sum(w * written, 1)
        if MAIN:
            d_strength += load_column(d_r, sequence, chunk, length, C)
        d_eta_logit = (1.0 - r / STRENGTH) * d_strength
        w *= r[:, None]
        pairs = -dot_nt(w, written, LOW) * fade(before, g, token, True)
        # k as what was written before, and then as what is being written
        d_k = dot(written, d_pi, LOW) * tl.exp2(whole - g)[:, None]
        d_end = tl.sum(k * d_k) + tl.exp2(whole) * tl.sum((pi - unit(chunk, D)) * d_pi)
        d_k += dot_tn(pairs, k, LOW)
        by_past = tl.sum(k * d_k, 1)
        d_k += dot(pairs, k, LOW)
        d_target = dot(w, pi, LOW)
        d_k += (w - d_target) * tl.exp2(before)[:, None]
        by_now = tl.sum(k * d_k, 1) - by_past
        d_k += load_tile(d_key, sequence, chunk, length, C, D) - w - KEY_SHARE * d_target
        scale = load_column(key_scale, sequence, chunk, length, C)
        d_made_k = normalize_backward(d_k, k, scale)
        store_tile(d_x, d_made_k, sequence, chunk, length, C, D)
        # the logits
        d_log = tl.cumsum(by_now - by_past, reverse=True) + d_end
        if not DECAYED:
            d_log -= by_now
        d_log += load_column(d_decay, sequence, chunk, length, C)
        d_alpha_logit = tl.where(token < length, d_log * tl.sigmoid(-alpha_logit), 0.0)
        store_column(d_eta, d_eta_logit, sequence, chunk, length, C)
        store_column(d_alpha, d_alpha_logit, sequence, chunk, length, C)
        # Pi, by what it made k and the logits of
        d_pi *= tl.exp2(whole)
        if not MAIN:
            d_pi += load_square(d_state, sequence * chunks + chunk, D)
        d_from_a = dot(d_made_k, load_square(for_key, head, D), LOW)
        d_from_a += d_eta_logit[:, None] * load_vector(for_gates, 2 * head, D)
        d_from_a += d_alpha_logit[:, None] * load_vector(for_gates, 2 * head + 1, D)
        d_pi += dot_tn(d_from_a, load_tile(a, sequence, chunk, length, C, D), LOW)
        # v, and Pi by what it made v and the targets of
        target = load_tile(value, sequence, chunk, length, C, D)
        d_made_v = d_target
        if UNIT_VALUE:
            value_scale = inverse_norm(target)
            target = target * value_scale[:, None]
            d_made_v = normalize_backward(d_target, target, value_scale)
        d_pi += dot_tn(w, target - (KEY_SHARE + tl.exp2(before)[:, None]) * k, LOW)
        if MAIN:
            d_made_v += load_tile(d_value, sequence, chunk, length, C, D)
        store_tile(d_v, d_made_v, sequence, chunk, length, C, D)
        d_from_b = dot(d_made_v, load_square(for_value, head, D), LOW)
        d_pi += dot_tn(d_from_b, load_tile(b, sequence, chunk, length, C, D), LOW)
        if DOCUMENTS:
            d_pi *= tl.load(carried + sequence // heads * chunks + chunk)
    store_square(d_current, d_pi, sequence, D)

"""The serial passes of the main memory S, of which a program carries some columns.

S is held transposed, [keys, values]: its columns, one a dimension of the values, do not depend on
one another, so that a sequence and head is shared out over several programs.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from nlscale.ops.memory.kernels.chunk import dot, dot_tn, load_column, load_tile, log_decay


@triton.jit(do_not_specialize=["length", "chunks", "heads"])
def main_kernel(
    key, write, from_state, alpha_logits, current, carried, states, last,
    length, chunks, heads,
    C: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """D = write - from_state S^T, which takes the place of `write`;  S' = exp(g_C) S + D^T n.

    current, last: S [sequences, D, D], fp32; states: S^T at the start of chunks [sequences,
    chunks, D, D]; carried: if DOCUMENTS, 0 at chunks before which S starts anew, else 1, [batch,
    chunks].
    """
    LOW: tl.constexpr = key.dtype.element_ty
    sequence = tl.program_id(0)
    of_key = tl.arange(0, D)[:, None]
    of_value = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    own = sequence.to(tl.int64) * (D * D)
    state = tl.load(current + own + of_value * D + of_key)
    for chunk in range(chunks):
        if DOCUMENTS:
            state *= tl.load(carried + sequence // heads * chunks + chunk)
        place = (sequence.to(tl.int64) * chunks + chunk) * (D * D)
        tl.store(states + place + of_key * D + of_value, state.to(LOW))
        token = chunk * C + tl.arange(0, C)
        alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
        decay = log_decay(alpha_logit, token, length)
        g = tl.cumsum(decay)
        whole = tl.sum(decay)
        row = (sequence.to(tl.int64) * length + token[:, None]) * D + of_value
        inside = token[:, None] < length
        written = tl.load(write + row, mask=inside, other=0.0).to(tl.float32)
        written -= dot(load_tile(from_state, sequence, chunk, length, C, D), state, LOW)
        tl.store(write + row, written.to(LOW), mask=inside)
        left = load_tile(key, sequence, chunk, length, C, D) * tl.exp2(whole - g)[:, None]
        state = state * tl.exp2(whole) + dot_tn(left, written, LOW)
    tl.store(last + own + of_value * D + of_key, state)


@triton.jit(do_not_specialize=["length", "chunks", "heads"])
def main_backward_kernel(
    key, from_state, alpha_logits, d_write, d_state, d_last, carried, d_after, d_current,
    length, chunks, heads,
    C: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dD += n dS'^T,  dS = exp(g_C) dS' + (what the reads have left) - dD^T from_state.

    d_write: dD as the reads see it, and then all of it. d_state: dS^T at the start of chunks as the
    reads see it; d_after: dS^T after each chunk; both [sequences, chunks, D, D].
    """
    LOW: tl.constexpr = key.dtype.element_ty
    sequence = tl.program_id(0)
    of_key = tl.arange(0, D)[:, None]
    of_value = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    own = sequence.to(tl.int64) * (D * D)
    d_main = tl.load(d_last + own + of_value * D + of_key)
    for step in range(chunks):
        chunk = chunks - 1 - step
        place = (sequence.to(tl.int64) * chunks + chunk) * (D * D) + of_key * D + of_value
        tl.store(d_after + place, d_main.to(LOW))
        token = chunk * C + tl.arange(0, C)
        alpha_logit = load_column(alpha_logits, sequence, chunk, length, C)
        decay = log_decay(alpha_logit, token, length)
        g = tl.cumsum(decay)
        whole = tl.sum(decay)
        left = load_tile(key, sequence, chunk, length, C, D) * tl.exp2(whole - g)[:, None]
        row = (sequence.to(tl.int64) * length + token[:, None]) * D + of_value
        inside = token[:, None] < length
        d_written = tl.load(d_write + row, mask=inside, other=0.0).to(tl.float32)
        d_written += dot(left, d_main, LOW)
        tl.store(d_write + row, d_written.to(LOW), mask=inside)
        d_main = d_main * tl.exp2(whole) + tl.load(d_state + place).to(tl.float32)
        past = load_tile(from_state, sequence, chunk, length, C, D)
        d_main -= dot_tn(past, d_written, LOW)
        if DOCUMENTS:
            d_main *= tl.load(carried + sequence // heads * chunks + chunk)
    tl.store(d_current + own + of_value * D + of_key, d_main)

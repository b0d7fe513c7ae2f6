"""The self-modifying memory, chunk by chunk, as a pure function (docs/concepts/memory.md).

One `d x d` transfer matrix `Pi` a head and sequence carries every memory that makes k, v and the
gates, because all of them are multiplied from the right by the same thing. The main memory is
either read off that matrix (`hope-pure`, `hope-paper`) or is a state `S` of its own (`hope`,
`gated-delta`), written with the same keys and gates. Within a chunk, whose start is `Pi_s`, token t
does

    k_t = normalize(a_t + lambda_k M_k Pi_s a_t)      v_t = b_t + lambda_v M_v Pi_s b_t
    d_t = eta_t ( Pi_s (v_t - c k_t) - Pi_{t-1} k_t )
    Pi_t = alpha_t Pi_{t-1} + (1 - alpha_t) I + d_t k_t^T          (anchored)
    S_t  = alpha_t S_{t-1}  + eta_t (v_t - S_{t-1} k_t) k_t^T

and the chunk form solves the triangular system that couples the d_t, so that a chunk costs a few
matrix products. `nlscale.ops.memory.reference` is the same token by token, in float64.

A memory whose writes depend on S itself, or on a gain, is scanned chunk by chunk in torch
(`nlscale.ops.memory.serial`). Of all others there are two implementations. bf16 inputs on a GPU run
through the kernels of `nlscale.ops.memory.kernels`, in the sizes they take (`sizes.py` there says
which); all else, and the rest of a chunk that an earlier piece of the sequence has begun, through
torch, in fp32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.ops.memory.chunk import ChunkWrites
from nlscale.ops.memory.kernels import sizes as fused_scan
from nlscale.ops.memory.pieces import Piece, piece_of, whole_piece
from nlscale.ops.memory.reads import ChunkReads
from nlscale.ops.memory.rules import MainWeights, MemoryRules, MemoryState, MemoryWeights
from nlscale.ops.memory.serial import Course, Memories, Tokens, Weights, begin, serial_run

Makers = tuple[Tensor, Tensor, Tensor]
"""lambda_k M_k, lambda_v M_v [heads, d, d], and [m_eta; m_alpha] [heads, 2, d]: what k, v and the
gates are made with."""


def memory_scan(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: MemoryWeights | None,
    rules: MemoryRules,
    state: MemoryState | None = None,
    carried: Tensor | None = None,
    kernels: bool = True,
    lengths: Tensor | None = None,
    main: MainWeights | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write and read the memory over a sequence; differentiable through every write.

    Args:
        a: what feeds k, [batch, heads, time, d].
        b: what feeds v, same shape.
        q: queries of unit norm, same shape.
        eta: static logit of the write strength, [batch, heads, time]; of gates of channels
            (`MemoryRules.channel_gates`) those of b and w side by side, [batch, heads, time, 2 d].
        alpha: static logit of the decay, same shape; of gates of channels [batch, heads, time, d].
        weights: the initial memories; None for a static memory.
        rules: what kind of memory it is.
        state: where an earlier piece of the sequence ended; None at the start.
        carried: 0 at chunks before which the memory starts anew, else 1, fp32 [batch, chunks];
            for whole chunks without a `state`. None: it never does.
        kernels: whether the kernels for GPUs may be used.
        lengths: how many of its tokens each row reads, int64 [batch], on the CPU; the others change
            nothing, and what is read at them has no meaning. None: all.
        main: what is learned of the writes to S, where the rules have some of that.

    Returns:
        The reads [batch, heads, time, d], in the dtype of `a`, and the state after the piece.
        Feeding a sequence in pieces of any length gives what feeding it at once gives, whatever
        the rows beside it.
    """
    dtype, length, d = a.dtype, a.shape[2], a.shape[3]
    wide = torch.promote_types(dtype, torch.float32)
    assert carried is None or (state is None and lengths is None and length % rules.chunk == 0)
    anew = state is None
    if state is None:
        state = _initial_state(a, wide, weights, rules)
    start, current = state.start, state.current
    if anew and lengths is None:
        piece = whole_piece(len(a), length, rules.chunk)
    else:
        piece = piece_of(state.position, length, lengths, rules.chunk, a.device)
    if rules.serial:
        tokens = Tokens(*(x.to(wide) for x in (a, b, q, eta, alpha)))
        assert main is not None, "the rules say that something is learned"
        every = Weights.of(weights, main, wide)
        out, after = _serial_scan(piece, tokens, state, carried, every, rules)
        return out.to(dtype), after
    makers = None if weights is None else _makers(weights, wide)
    additive = weights is None or weights.lambda_key is not None
    fused = kernels and fused_scan.supports(a, b, q, rules, weights is None)
    parts = piece.parts(a, b, q, eta.to(wide), alpha.to(wide))
    each: Tensor | None = None  # makers for the torch form, once for all runs
    reads = []
    for run, part in zip(piece.runs, parts, strict=True):
        begun = start if run.begun else None
        if fused and begun is None:
            read, current = _fused_run(part, current, carried, makers, additive, rules)
        else:
            if makers is not None and each is None:
                key, value, gates = makers
                each = _each_sequence(torch.cat([key, gates, value], dim=1), len(a))
            part = tuple(x.to(wide) for x in part)
            sizes = run.count, run.size
            read, current = _torch_run(sizes, part, current, begun, carried, each, additive, rules)
        reads.append(read)
        if start is not None:
            start = run.renewed(start, current.split(d, dim=2)[0])
    out = piece.joined(reads) if reads else torch.zeros_like(q)
    if weights is not None and weights.read is not None:
        out = out @ weights.read.to(out.dtype).mT
    return out.to(dtype), MemoryState(start, current, piece.position)


def _serial_scan(
    piece: Piece,
    tokens: Tokens,
    state: MemoryState,
    carried: Tensor | None,
    weights: Weights,
    rules: MemoryRules,
) -> tuple[Tensor, MemoryState]:
    """All runs of a piece, chunk by chunk."""
    d = tokens.a.shape[-1]
    pi = None if state.start is None else state.current[:, :, :d]
    main = state.current[:, :, -d:]
    start = main if state.main_start is None else state.main_start
    memories = Memories(
        main, start, pi, state.start, state.uncertainty, state.momentum, state.since
    )
    reads = []
    parts = zip(piece.runs, piece.parts(*tokens), piece.stands(), strict=True)
    for run, part, stands in parts:
        course = Course(rules, run.size, run.ends(stands), stands, carried)
        read, memories = serial_run(course, Tokens(*part), memories, weights)
        reads.append(read)
    main, start, pi, pi_start, uncertainty, momentum, since = memories
    if rules.chunk_momentum and since is None:
        since = torch.zeros_like(main)
    after = MemoryState(
        pi_start,
        main if pi is None else torch.cat([pi, main], 2),
        piece.position,
        start if rules.reads_state else None,
        uncertainty,
        momentum,
        since,
    )
    return piece.joined(reads) if reads else torch.zeros_like(tokens.q), after


def _torch_run(
    sizes: tuple[int, int],
    part: tuple[Tensor, ...],
    current: Tensor,
    begun: Tensor | None,
    carried: Tensor | None,
    makers: Tensor | None,
    additive: bool,
    rules: MemoryRules,
) -> tuple[Tensor, Tensor]:
    """Consecutive chunks of equal size, in torch: what they read, and the state after them.

    `makers` are [M_k; m_eta; m_alpha; M_v] of each sequence.
    """
    (count, size), (a, b, q, eta, alpha) = sizes, part
    batch, heads, length, d = a.shape
    xa, xb, xq, logits = (
        _by_chunk(x, count, size) for x in (a, b, q, torch.stack([eta, alpha], -1))
    )
    if carried is not None:
        carried = carried.to(xa.dtype).repeat_interleave(heads, 0).T[..., None, None]
    k, g, fade, main, written, last = ChunkWrites.apply(
        xa, xb, logits, current.flatten(0, 1), None if begun is None else begun.flatten(0, 1),
        carried, makers, additive, rules,
    )  # fmt: skip
    anchored = rules.anchored and not rules.main_memory
    read = ChunkReads.apply(xq, k, g, fade, main, written, anchored)
    return read.movedim(0, 1).reshape(batch, heads, length, d), last.view_as(current)


def _fused_run(
    part: tuple[Tensor, ...],
    current: Tensor,
    carried: Tensor | None,
    makers: Makers | None,
    additive: bool,
    rules: MemoryRules,
) -> tuple[Tensor, Tensor]:
    """The same by the kernels, for chunks of which none was begun before."""
    from nlscale.ops.memory.kernels.fused import FusedScan  # Triton is there only where it is used

    states = current.split(part[0].shape[-1], dim=2)
    pi = None if makers is None else states[0]
    main = states[-1] if rules.main_memory else None
    read, *after = FusedScan.apply(
        *part, pi, main, carried, *(makers or (None,) * 3), additive, rules
    )
    return read, torch.cat([x for x in after if x is not None], dim=2)


def _initial_state(
    a: Tensor, dtype: torch.dtype, weights: MemoryWeights | None, rules: MemoryRules
) -> MemoryState:
    batch, heads, _, d = a.shape
    parts = []
    if weights is not None:
        parts.append(torch.eye(d, dtype=dtype, device=a.device).expand(batch, heads, d, d))
    if rules.main_memory:
        parts.append(a.new_zeros(batch, heads, d, d, dtype=dtype))
    position = torch.zeros(batch, dtype=torch.long)
    start = parts[0] if weights is not None else None
    return MemoryState(start, torch.cat(parts, dim=2), position, **begin(a, dtype, rules))


def _makers(weights: MemoryWeights, dtype: torch.dtype) -> Makers:
    key, value, gates = (x.to(dtype) for x in (weights.key, weights.value, weights.gates))
    if weights.lambda_key is not None and weights.lambda_value is not None:
        key = weights.lambda_key.to(dtype)[:, None, None] * key
        value = weights.lambda_value.to(dtype)[:, None, None] * value
    return key, value, gates


def _each_sequence(x: Tensor, batch: int) -> Tensor:
    """[heads, ...] -> [batch * heads, ...]."""
    return x.expand(batch, *x.shape).flatten(0, 1)


def _by_chunk(x: Tensor, count: int, size: int) -> Tensor:
    """[batch, heads, time, ...] -> [chunk, batch * heads, size, ...]."""
    return x.unflatten(2, (count, size)).movedim(2, 0).flatten(1, 2)

"""The self-modifying memory, chunk by chunk (MATH 4.2, 4.3, 4.5), as a pure function.

One `d x d` transfer matrix `Pi` a head and sequence carries every memory that makes k, v and the
gates, because all of them are multiplied from the right by the same thing (MATH 4.1). The main
memory is either read off that matrix (`hope-pure`, `hope-paper`) or is a state `S` of its own
(`hope`, `gated-delta`), written with the same keys and gates. Within a chunk, whose start is
`Pi_s`, token t does

    k_t = normalize(a_t + lambda_k M_k Pi_s a_t)      v_t = b_t + lambda_v M_v Pi_s b_t
    d_t = eta_t ( Pi_s (v_t - c k_t) - Pi_{t-1} k_t )
    Pi_t = alpha_t Pi_{t-1} + (1 - alpha_t) I + d_t k_t^T          (anchored)
    S_t  = alpha_t S_{t-1}  + eta_t (v_t - S_{t-1} k_t) k_t^T

and the chunk form solves the triangular system that couples the d_t, so that a chunk costs a few
matrix products. `nlscale.ops.reference` is the same token by token, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALIZE_EPS = 1e-6
"""Added to the squared norm of k and v before the root."""


@dataclass(frozen=True)
class MemoryRules:
    """What kind of memory it is; see `nlscale.config.MemoryConfig` for the meaning of each."""

    chunk: int
    anchored: bool
    c: float
    normalize_value: bool
    main_memory: bool
    """The main memory is a state of its own, S; otherwise it is read off Pi."""


@dataclass
class MemoryWeights:
    """The learned initial memories of the heads; None for a static memory (`gated-delta`)."""

    key: Tensor
    """M_k, [heads, d, d]."""
    value: Tensor
    """M_v, [heads, d, d]."""
    gates: Tensor
    """m_eta and m_alpha, [heads, 2, d]."""
    lambda_key: Tensor | None
    """Weight of the self-modified part of k, [heads]; None where there is no static part."""
    lambda_value: Tensor | None
    """Weight of the self-modified part of v, [heads]."""
    read: Tensor | None
    """M_m, [heads, d, d]; None where the main memory is a state of its own."""


@dataclass
class MemoryState:
    """What is carried from one piece of a sequence to the next; all fp32."""

    start: Tensor | None
    """Pi at the start of the current chunk, [batch, heads, d, d]; None for a static memory."""
    current: Tensor
    """Pi and S now, stacked where there are both, [batch, heads, d or 2d, d]."""
    position: int
    """Tokens of the current chunk already written."""


def memory_scan(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: MemoryWeights | None,
    rules: MemoryRules,
    state: MemoryState | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write and read the memory over a sequence; differentiable through every write.

    Args:
        a: what feeds k, [batch, heads, time, d].
        b: what feeds v, same shape.
        q: queries of unit norm, same shape.
        eta: static logit of the write strength, [batch, heads, time].
        alpha: static logit of the decay, same shape.
        weights: the initial memories; None for a static memory.
        rules: what kind of memory it is.
        state: where an earlier piece of the sequence ended; None at the start.

    Returns:
        The reads [batch, heads, time, d], in the dtype of `a`, and the state after the piece.
        Feeding a sequence in pieces of any length gives what feeding it at once gives.
    """
    dtype, length = a.dtype, a.shape[2]
    a, b, q, eta, alpha = (x.float() if x.dtype != torch.float64 else x for x in (a, b, q, eta, alpha))
    if state is None:
        state = _initial_state(a, weights, rules)
    start, current, position = state.start, state.current, state.position
    maker = None if weights is None else _stack(weights)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    pieces = _pieces(position, length, rules.chunk)
    # split, not slices: the backward of a slice fills a tensor of the whole length with zeros
    parts = zip(*(x.split(pieces, dim=2) for x in (a, b, q, eta, alpha)), strict=True)
    reads = []
    for size, part in zip(pieces, parts, strict=True):
        read, current = _chunk(*part, start, current, maker, weights, rules, eye)
        reads.append(read)
        position = (position + size) % rules.chunk
        if position == 0 and start is not None:
            start = current.split(a.shape[-1], dim=2)[0]
    return torch.cat(reads, dim=2).to(dtype), MemoryState(start, current, position)


def _initial_state(a: Tensor, weights: MemoryWeights | None, rules: MemoryRules) -> MemoryState:
    batch, heads, _, d = a.shape
    parts = []
    if weights is not None:
        parts.append(torch.eye(d, dtype=a.dtype, device=a.device).expand(batch, heads, d, d))
    if rules.main_memory:
        parts.append(a.new_zeros(batch, heads, d, d))
    return MemoryState(parts[0] if weights is not None else None, torch.cat(parts, dim=2), 0)


def _pieces(position: int, length: int, chunk: int) -> list[int]:
    """Lengths into which a piece of a sequence is cut at the ends of chunks."""
    first = min(chunk - position, length)
    rest = length - first
    return [first] + [chunk] * (rest // chunk) + ([rest % chunk] if rest % chunk else [])


def _stack(weights: MemoryWeights) -> Tensor:
    """[M_k; m_eta; m_alpha; M_v], [heads, 2d + 2, d]: one product with Pi makes them all."""
    return torch.cat([weights.key, weights.gates, weights.value], dim=1)


def _chunk(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    eta: Tensor,
    alpha: Tensor,
    start: Tensor | None,
    current: Tensor,
    maker: Tensor | None,
    weights: MemoryWeights | None,
    rules: MemoryRules,
    eye: Tensor,
) -> tuple[Tensor, Tensor]:
    """Reads of one chunk (or a part of one) and the stacked states after it."""
    d = a.shape[-1]
    if maker is None or weights is None or start is None:
        k, v = a, b
    else:
        modified = maker.to(a.dtype) @ start  # M Pi: the memories as they are in this chunk
        for_key, for_value = modified.split([d + 2, d], dim=2)
        k, eta_made, alpha_made = (a @ for_key.transpose(-1, -2)).split([d, 1, 1], dim=-1)
        v = b @ for_value.transpose(-1, -2)
        eta, alpha = eta + eta_made.squeeze(-1), alpha + alpha_made.squeeze(-1)
        if weights.lambda_key is not None and weights.lambda_value is not None:
            k = torch.addcmul(a, k, weights.lambda_key.to(a.dtype)[:, None, None])
            v = torch.addcmul(b, v, weights.lambda_value.to(a.dtype)[:, None, None])
    k = normalize(k)
    eta = torch.sigmoid(eta).unsqueeze(-1)
    log_alpha = F.logsigmoid(alpha)
    g = torch.cumsum(log_alpha, dim=-1)
    before = g - log_alpha  # decay from the start to just before each token
    decay_before = torch.exp(before).unsqueeze(-1)

    # (I + L) D = eta * (target - decayed read of the state at the start), L strictly lower.
    coupling = _lower(before.unsqueeze(-1) - g.unsqueeze(-2), -1) * (k @ k.transpose(-1, -2))
    residual = -decay_before * (k @ current.transpose(-1, -2))
    targets = []
    if start is not None:
        target = normalize(v) if rules.normalize_value else v
        if rules.c != 0:
            target = target - rules.c * k
        target = target @ start.transpose(-1, -2)
        targets.append(target + (decay_before - 1) * k if rules.anchored else target)
    if rules.main_memory:
        targets.append(v)
    right = eta * (torch.cat(targets, dim=-1) + residual)
    writes = torch.linalg.solve_triangular(
        eta * coupling, right, upper=False, unitriangular=True
    )  # unitriangular: the ones of I + L are not stored

    scores = _lower(g.unsqueeze(-1) - g.unsqueeze(-2), 0) * (q @ k.transpose(-1, -2))
    decay = torch.exp(g).unsqueeze(-1)
    # the main memory is S where there is one, else Pi: the last d rows of the states
    main, written = current.split(d, dim=2)[-1], writes.split(d, dim=-1)[-1]
    read = decay * (q @ main.transpose(-1, -2)) + scores @ written
    if not rules.main_memory:
        assert weights is not None and weights.read is not None
        if rules.anchored:
            read = read + (1 - decay) * q
        read = read @ weights.read.to(a.dtype).transpose(-1, -2)

    last = g[..., -1:]
    kept = torch.exp(last).unsqueeze(-1)
    after = kept * current + (torch.exp(last - g).unsqueeze(-1) * writes).transpose(-1, -2) @ k
    if start is not None and rules.anchored:
        anchor = (1 - kept) * eye
        after = after + (F.pad(anchor, (0, 0, 0, d)) if rules.main_memory else anchor)
    return read, after


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORMALIZE_EPS)


def _lower(exponent: Tensor, diagonal: int) -> Tensor:
    """exp of the lower triangle; what lies above is masked before exp, where it may overflow."""
    size = exponent.shape[-1]
    keep = torch.ones(size, size, dtype=torch.bool, device=exponent.device).tril(diagonal)
    return torch.exp(exponent.masked_fill(~keep, float("-inf")))

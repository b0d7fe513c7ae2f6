"""The chunk form of the memory (docs/concepts/memory.md), with its derivative worked out by hand.

Chunks follow one another, because the memory at the end of one makes the keys of the next. That
loop is what limits the speed of the mixer: `ChunkWrites` holds what must be in it, and
`nlscale.ops.memory.reads` what can be done for all chunks at once. Under plain autograd a chunk is
some hundred small operations, each recorded, and as many again backward.

Notation, for one chunk, head and sequence; rows are tokens i, j = 1 .. C:

    Z            the states stacked, [Pi; S], at the start; d or 2d rows of d
    P            Pi where the keys are made: at the start of the chunk, also where a part of the
                 chunk was written before and Z has moved on from it
    k, v, r      keys, values, write strengths (sigmoid of a logit)
    g_i          log of the decay from the start up to and including token i; g_0 = 0
    F_ij         exp(g_i - g_j) for i >= j, i = 0 .. C; else 0: what is left of write j after i
    F', F"       its rows 0 .. C - 1 (before each token) and 1 .. C (after each)
    D            what is written: the state after i is  exp(g_i) Z + sum_{j <= i} F_ij D_j k_j^T

The decays come only as exp of differences <= 0, and never as divisors. dY is the derivative of
the loss by Y; that by a decay is taken by its log: d log F = dF * F, element by element.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.memory.rules import NORMALIZE_EPS, MemoryRules
from nlscale.ops.threads import on_one_thread


class ChunkWrites(torch.autograd.Function):
    """The keys, decays and writes of consecutive chunks of equal size, and the states.

    Forward, chunk by chunk (anchored terms in brackets, Pi's rows only):

        [x | logits] = [a | logits] + a (for_key P)^T           k = x / |x|
        v = b + b (for_value P)^T                               u = v / |v|, or v
        W = F' * (k k^T) without the diagonal                   T = (I + diag(r) W)^{-1}
        X = [ (u - c k) P^T [ + f - k ] ; v ] - f Z^T           f_i = exp(g_{i-1}) k_i
        D = T diag(r) X
        Z' = exp(g_C) Z + D^T n  [ + (1 - exp(g_C)) I ]         n_j = F_Cj k_j

    T stands as a matrix because the backward uses it again; its entries are bounded by 1, since
    every write is a contraction.

    Backward, the chunks in reverse order:

        dD = n dZ'^T + (from the reads)      y = T^T dD      w = diag(r) y = dX
        d logit of r_i = (1 - r_i) y_i . D_i             as X - W D = D / r
        E = -(w D^T) * F'                    df = -w Z [ + w ]
        A_j = F_Cj (D dZ')_j + (E^T k)_j     k as what was written, A, and as what is being
        B_i = exp(g_{i-1}) df_i + (E k)_i    written, B; dk += A + B [ - w ]
        dg_i += k_{i+1} . B_{i+1} - k_i . A_i
        dg_C += Z' . dZ' [ - trace dZ' ]
        dZ = exp(g_C) dZ' - w^T f
        d(u - c k) = w P                     dP = w^T (u - c k) + (through for_key, for_value)

    Where P is the Pi of Z, which is all but the rest of a chunk begun before, its two products in
    X are one, (u - c k - f) P^T, and so are those of the backward.
    """

    @staticmethod
    @on_one_thread
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        logits: Tensor,
        current: Tensor,
        start: Tensor | None,
        carried: Tensor | None,
        for_key: Tensor | None,
        for_value: Tensor | None,
        additive: bool,
        rules: MemoryRules,
    ) -> tuple[Tensor, ...]:
        """With n chunks of C tokens and N = batch * heads:

        Args:
            a, b: what feeds k and v, [n, N, C, d].
            logits: static logits of eta and alpha, [n, N, C, 2].
            current: Z at the start of the first chunk, [N, d or 2d, d].
            start: P of the first chunk, [N, d, d], where it was begun before; else None.
            carried: 0 at chunks before which states start anew, else 1, [n, N, 1, 1], or None.
            for_key, for_value: [M_k; m_eta; m_alpha] and M_v, [N, d + 2, d] and [N, d, d];
                None for a static memory.
            additive: whether a and b themselves are part of k and v.
            rules: see there.

        Returns:
            k [n, N, C, d], g_0 .. g_C [n, N, C + 1], F [n, N, C + 1, C] (not differentiable), the
            main memory at the start of each chunk [n, N, d, d], what is written to it
            [n, N, C, d], and Z after the last chunk.
        """
        count, batch, size, d = a.shape
        rows = current.shape[1]
        anchored = rules.anchored and for_key is not None
        k, g = a.new_empty(a.shape), a.new_zeros(count, batch, size + 1)
        fade = a.new_empty(count, batch, size + 1, size)
        writes = a.new_empty(count, batch, size, rows)
        states = a.new_empty(count + 1, batch, rows, d)
        states[0] = current
        above = torch.full((size + 1, size), float("-inf"), dtype=a.dtype, device=a.device).triu()
        eye = torch.eye(size, dtype=a.dtype, device=a.device).expand(batch, size, size)
        kept: list[Tensor | None] = []
        each = (x.unbind(0) for x in (a, b, logits, k, g, fade, writes, states[:-1], states[1:]))
        for i, parts in enumerate(zip(*each, strict=True)):
            a_i, b_i, logits_i, k_i, g_i, fade_i, write, state, after = parts
            if carried is not None:
                state.mul_(carried[i])
                if for_key is not None:
                    state[:, :d].diagonal(dim1=1, dim2=2).add_(1 - carried[i, ..., 0])
            pi, main = state[:, :d], state[:, -d:]
            p = key_now = value_now = v_scale = None
            x, v, gates = a_i, b_i, logits_i
            if for_key is not None and for_value is not None:
                p = pi if start is None or kept else start
                key_now, value_now = torch.bmm(for_key, p), torch.bmm(for_value, p)
                x, gates = torch.bmm(a_i, key_now.mT).split([d, 2], dim=-1)
                v = torch.bmm(b_i, value_now.mT)
                gates = gates + logits_i
                if additive:
                    x, v = x + a_i, v.add_(b_i)
            k_scale = _inverse_norm(x)
            torch.mul(x, k_scale, out=k_i)
            r = torch.sigmoid(gates[..., :1])
            torch.cumsum(F.logsigmoid(gates[..., 1]), -1, out=g_i[:, 1:])
            # what lies above is masked before exp, where it may overflow
            torch.sub(g_i[:, :, None], g_i[:, None, 1:], out=fade_i).add_(above).exp_()
            since_start = torch.exp(g_i).unsqueeze(-1)
            before = since_start[:, :-1]
            coupling = torch.bmm(k_i, k_i.mT).mul_(fade_i[:, :-1]).mul_(r)
            solve = torch.linalg.solve_triangular(
                coupling, eye, upper=False, unitriangular=True
            )  # unitriangular: the ones of I + diag(r) W are not stored

            faded = k_i * before
            right = []
            if p is not None:
                if rules.normalize_value:
                    v_scale = _inverse_norm(v)
                target = _target(v, v_scale, k_i, rules)
                right.append(torch.bmm(target - faded, pi.mT))
                if p is not pi:
                    right[0].baddbmm_(target, (p - pi).mT)
                if anchored:
                    right[0].add_(faded).sub_(k_i)
            if rules.main_memory:
                right.append(torch.baddbmm(v, faded, main.mT, alpha=-1))
            torch.bmm(solve, torch.cat(right, -1).mul_(r), out=write)

            whole = since_start[:, -1:]
            torch.mul(state, whole, out=after)
            after.baddbmm_(write.mT, k_i * fade_i[:, -1, :, None])
            if anchored:
                after[:, :d].diagonal(dim1=1, dim2=2).add_(1 - whole[:, 0])
            kept += [
                key_now, value_now, v, v_scale, k_scale, r, gates, since_start, solve
            ]  # fmt: skip
        ctx.rules, ctx.additive = rules, additive
        ctx.save_for_backward(
            a, b, start, carried, for_key, for_value, k, fade, writes, states, *kept
        )
        ctx.mark_non_differentiable(fade)
        ctx.set_materialize_grads(False)  # or one of zeros, large, would be made for F
        return k, g, fade, states[:-1, :, -d:], writes[..., -d:], states[-1].clone()

    @staticmethod
    @on_one_thread
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, start, carried, for_key, for_value, k, fade, writes, states, *kept = ctx.saved_tensors
        rules, (count, _, size, d) = ctx.rules, a.shape
        static = for_key is None
        anchored = rules.anchored and not static
        # what was not used has no derivative: reads without the state after, or the reverse
        d_k, d_g, _, d_main, d_written = (x if x is None else x.unbind(0) for x in d_outputs[:5])
        d_state = (
            torch.zeros_like(states[0])
            if d_outputs[5] is None
            else d_outputs[5].clone(memory_format=torch.contiguous_format)
        )
        up_to = torch.ones(size + 1, size, dtype=a.dtype, device=a.device).tril(-1)
        d_a, d_b, d_logits = torch.empty_like(a), torch.empty_like(b), a.new_empty(*a.shape[:3], 2)
        d_makers: list[Any] = [torch.zeros_like(x) for x in (for_key, for_value) if x is not None]
        d_start = None
        for i in reversed(range(count)):
            state, k_i, write, fade_i = states[i], k[i], writes[i], fade[i]
            key_now, value_now, v, v_scale, k_scale, r, gates, since_start, solve = kept[
                9 * i : 9 * i + 9
            ]
            pi, main, d_pi = state[:, :d], state[:, -d:], d_state[:, :d]
            before, until_end = since_start[:, :-1], fade_i[:, -1, :, None]
            # the state after the chunk
            d_end = (states[i + 1] * d_state).sum((1, 2))
            if anchored:
                d_end -= d_pi.diagonal(dim1=1, dim2=2).sum(-1)
            d_write = torch.bmm(k_i * until_end, d_state.mT)
            if d_written is not None:
                d_write[:, :, -d:].add_(d_written[i])
            as_past = torch.bmm(write, d_state).mul_(until_end)
            d_state.mul_(since_start[:, -1:])
            if d_main is not None:
                d_state[:, -d:].add_(d_main[i])
            # the triangular system
            d_made = a.new_empty(*k_i.shape[:2], d + 2)
            d_x, d_gates = d_made.split([d, 2], dim=-1)
            w = torch.bmm(solve.mT, d_write)
            torch.mul(row_dot(w, write), 1 - r, out=d_gates[..., :1])
            w.mul_(r)
            pairs = torch.bmm(w, write.mT).neg_().mul_(fade_i[:, :-1])
            as_past.baddbmm_(pairs.mT, k_i)
            passed = row_dot(k_i, as_past)[..., 0]
            # its right side
            w_pi, d_v = w[:, :, :d], w[:, :, -d:]
            faded = k_i * before
            d_key = as_past if d_k is None else as_past.add_(d_k[i])
            d_faded = torch.zeros_like(faded)
            if rules.main_memory:
                d_faded.baddbmm_(d_v, main, beta=0, alpha=-1)
                d_state[:, -d:].sub_(torch.bmm(d_v.mT, faded))
            if not static:
                target = _target(v, v_scale, k_i, rules)
                d_target = torch.bmm(w_pi, pi)
                d_faded.sub_(d_target)
                if anchored:
                    d_faded.add_(w_pi)
                    d_key.sub_(w_pi)
                p = pi
                d_p = torch.bmm(w_pi.mT, target - faded)
                if start is not None and i == 0:
                    p = start
                    d_target.baddbmm_(w_pi, p - pi)
                    of_faded = torch.bmm(w_pi.mT, faded)
                    d_p.add_(of_faded)
                    d_pi.sub_(of_faded)
                if rules.c != 0:
                    d_key.sub_(d_target, alpha=rules.c)
                if v_scale is not None:
                    _normalize_backward(d_target, v * v_scale, v_scale, d_target)
                d_v = d_target.add_(d_v) if rules.main_memory else d_target
            as_now = d_faded.mul_(before).baddbmm_(pairs, k_i)
            d_key.add_(as_now)
            # keys and gates
            _normalize_backward(d_key, k_i, k_scale, d_x)
            d_gi = a.new_zeros(since_start.shape[:2]) if d_g is None else d_g[i].clone()
            d_gi[:, :-1].add_(row_dot(k_i, as_now)[..., 0])
            d_gi[:, 1:].sub_(passed)
            d_gi[:, -1].add_(d_end)
            torch.mul(torch.sigmoid(-gates[..., 1]), d_gi @ up_to, out=d_gates[..., 1])
            d_logits[i] = d_gates
            if static:
                d_a[i], d_b[i] = d_x, d_v
                if carried is not None:
                    d_state.mul_(carried[i])
                continue
            d_key_now, d_value_now = torch.bmm(d_made.mT, a[i]), torch.bmm(d_v.mT, b[i])
            d_p.baddbmm_(for_key.mT, d_key_now).baddbmm_(for_value.mT, d_value_now)
            d_makers[0].baddbmm_(d_key_now, p.mT)
            d_makers[1].baddbmm_(d_value_now, p.mT)
            d_ai, d_bi = torch.bmm(d_made, key_now), torch.bmm(d_v, value_now)
            d_a[i] = d_ai.add_(d_x) if ctx.additive else d_ai
            d_b[i] = d_bi.add_(d_v) if ctx.additive else d_bi
            if p is start:
                d_start = d_p
            else:
                d_pi.add_(d_p)
            if carried is not None:
                d_state.mul_(carried[i])
        d_makers = d_makers or [None, None]
        return d_a, d_b, d_logits, d_state, d_start, None, *d_makers, None, None


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row; the dimension is kept."""
    return (x * y).sum(-1, keepdim=True)


def _inverse_norm(x: Tensor) -> Tensor:
    return row_dot(x, x).add_(NORMALIZE_EPS).rsqrt_()


def _target(v: Tensor, v_scale: Tensor | None, k: Tensor, rules: MemoryRules) -> Tensor:
    """u - c k, of which Pi at the start of the chunk makes what Pi is to learn."""
    u = v if v_scale is None else v * v_scale
    return u if rules.c == 0 else torch.sub(u, k, alpha=rules.c)


def _normalize_backward(d_unit: Tensor, unit: Tensor, scale: Tensor, out: Tensor) -> None:
    """Derivative by x of unit = x scale, scale = 1 / sqrt(|x|^2 + eps)."""
    torch.mul(torch.addcmul(d_unit, unit, row_dot(unit, d_unit), value=-1), scale, out=out)

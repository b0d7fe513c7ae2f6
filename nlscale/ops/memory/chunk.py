"""The chunk form of the memory (docs/concepts/memory.md), with its derivative worked out by hand.

Chunks follow one another, because the memory at the end of one makes the keys of the next. That
loop is what limits the speed of the mixer: `ChunkWrites` holds what must be in it, and does all
else for all chunks at once, as do `nlscale.ops.memory.main` and `nlscale.ops.memory.reads`. Under
plain autograd a chunk is some hundred small operations, each recorded, and as many again backward.

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

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.memory import main
from nlscale.ops.memory.main import Keys, product, row_dot
from nlscale.ops.memory.rules import NORMALIZE_EPS, MemoryRules
from nlscale.ops.threads import on_one_thread


class ChunkWrites(torch.autograd.Function):
    """The keys, decays and writes of consecutive chunks of equal size, and the states.

    Forward (anchored terms in brackets, Pi's rows only):

        [x | logits] = [a | logits] + a (for_key P)^T           k = x / |x|
        v = b + b (for_value P)^T                               u = v / |v|, or v
        W = F' * (k k^T) without the diagonal                   T = (I + diag(r) W)^{-1}
        X = [ (u - c k) P^T [ + f - k ] ; v ] - f Z^T           f_i = exp(g_{i-1}) k_i
        D = T diag(r) X
        Z' = exp(g_C) Z + D^T n  [ + (1 - exp(g_C)) I ]         n_j = F_Cj k_j

    chunk by chunk as far as Pi needs it; what is S's follows (`nlscale.ops.memory.main`), and where
    there is no Pi keys are made for all chunks at once. T stands as a matrix because the backward
    uses it again; its entries are bounded by the largest write strength, since no write magnifies.

    A write that erases what has decayed (`MemoryRules.decayed_write`) is the same with the decay of
    the token itself: F" in the place of F', and g_i in that of g_{i-1}.

    Of writes that erase nothing (`MemoryRules.erases`) W and f are 0 and T is I: D = diag(r) v.

    Backward, first what is S's, and then Pi's, the chunks in reverse order:

        dD = n dZ'^T + (from the reads)      y = T^T dD      w = diag(r) y = dX
        d logit of r_i = (1 - r_i / strength) y_i . D_i  as X - W D = D / r
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
        makers: Tensor | None,
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
            makers: for_key, [M_k; m_eta; m_alpha], and for_value, M_v, one below the other,
                [N, 2d + 2, d]; None for a static memory.
            additive: whether a and b themselves are part of k and v.
            rules: see there.

        Returns:
            k [n, N, C, d], g_0 .. g_C [n, N, C + 1], F [n, N, C + 1, C] (not differentiable), the
            main memory at the start of each chunk [n, N, d, d], what is written to it
            [n, N, C, d], and Z after the last chunk.
        """
        count, batch, size, d = a.shape
        keys, made = _empty_keys(a, rules), None
        v, gates, v_scale, last = b, logits, None, []
        pi = pi_writes = states = writes = None
        if makers is None:
            _fill(
                keys.flat(),
                a.flatten(0, 1),
                logits[..., 1].flatten(0, 1),
                logits[..., :1].flatten(0, 1),
                rules.strength,
            )
        else:
            pi, pi_writes = a.new_empty(count + 1, batch, d, d), a.new_empty(a.shape)
            pi[0] = current[:, :d]
            made, v, gates = (
                a.new_empty(count, *makers.shape),
                b.new_empty(b.shape),
                logits.new_empty(logits.shape),
            )
            v_scale = a.new_empty(count, batch, size, 1) if rules.normalize_value else None
            given = torch.cat([a if additive else torch.zeros_like(a), logits], -1)
            each = zip(
                a, b, given, pi, pi[1:], pi_writes, made, v, gates, keys.each(), strict=False
            )
            for i, (a_i, b_i, given_i, state, after, write, made_i, v_i, gates_i, key) in enumerate(
                each
            ):
                if carried is not None:
                    state.mul_(carried[i])
                    state.diagonal(dim1=1, dim2=2).add_(1 - carried[i, ..., 0])
                p = state if start is None or i else start
                torch.bmm(makers, p, out=made_i)
                fed = torch.baddbmm(given_i, a_i, made_i[:, : d + 2].mT)
                gates_i.copy_(fed[..., d:])
                for_value = made_i[:, d + 2 :].mT
                torch.baddbmm(b_i, b_i, for_value, beta=float(additive), out=v_i)
                _fill(key, fed[..., :d], gates_i[..., 1], gates_i[..., :1], rules.strength)
                u = v_i
                if v_scale is not None:
                    u = v_i * _inverse_norm(v_i, out=v_scale[i])
                faded = key.faded
                target = _target(u, key.k, rules)
                right = _times_pi(target, faded, state, p)
                if rules.anchored:
                    right.add_(faded).sub_(key.k)
                torch.bmm(key.solve, right.mul_(key.r), out=write)
                torch.mul(state, key.whole, out=after)
                after.baddbmm_(write.mT, key.k * key.until_end)
                if rules.anchored:
                    after.diagonal(dim1=1, dim2=2).add_(1 - key.whole[:, 0])
            last.append(pi[-1])
        if rules.main_memory:
            states, writes = a.new_empty(count + 1, batch, d, d), a.new_empty(a.shape)
            states[0] = current[:, -d:]
            main.write(keys, v, carried, states, writes)
            last.append(states[-1])
        ctx.rules, ctx.additive = rules, additive
        ctx.save_for_backward(
            a, b, start, carried, makers, made, v, v_scale, gates, pi, pi_writes, states, writes,
            *keys.all,
        )  # fmt: skip
        ctx.mark_non_differentiable(keys.fade)
        ctx.set_materialize_grads(False)  # or one of zeros, large, would be made for F
        read, written = (pi, pi_writes) if states is None else (states, writes)
        assert read is not None and written is not None, "a memory of Pi, of S or of both"
        return keys.k, keys.g, keys.fade, read[:-1], written, torch.cat(last, 1)

    @staticmethod
    @on_one_thread
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (
            a, b, start, carried, makers, made, v, v_scale, gates, pi, pi_writes, states, writes,
            *of_keys,
        ) = ctx.saved_tensors  # fmt: skip
        rules, (count, batch, size, d) = ctx.rules, a.shape
        keys = Keys.of(of_keys, rules)
        # what was not used has no derivative: reads without the state after, or the reverse
        d_k, d_g, _, d_main, d_written, d_last = d_outputs
        d_k = torch.zeros_like(a) if d_k is None else d_k
        d_g = torch.zeros_like(keys.g) if d_g is None else d_g.clone()
        d_last = a.new_zeros(batch, 2 * d, d) if d_last is None else d_last
        of_main = None
        if states is not None:
            of_main = main.write_backward(
                keys, states, writes, carried, d_last[:, -d:], d_main, d_written
            )
            d_main = d_written = None
        # [dx | d logits]
        d_made, open_, closed = (
            a.new_empty(count, batch, size, d + 2),
            torch.sigmoid(-gates[..., 1]),
            1 - keys.r / rules.strength,
        )
        if makers is None:
            assert of_main is not None, "a static memory is S"
            torch.mul(of_main.d_r, closed, out=d_made[..., d : d + 1])
            of_reads = (d_k, d_g, of_main.d_end, open_, d_made)
            given: Any = (of_main.pairs, of_main.past, of_main.d_faded, *of_reads)
            flat: Any = (None if x is None else x.flatten(0, 1) for x in given)
            _fill_backward(keys.flat(), *flat)
            d_x, d_logits = d_made.split([d, 2], dim=-1)
            return d_x, of_main.d_v, d_logits, of_main.d_state, *(None,) * 5
        u = v if v_scale is None else v * v_scale
        rest = _target(u, keys.k, rules) - keys.faded
        d_v = v.new_zeros(v.shape) if of_main is None else of_main.d_v
        d_pi, d_by = d_last[:, :d].clone(), makers.new_empty(makers.shape)
        d_makers, d_start = torch.zeros_like(makers), None
        every = [*keys.each()]
        for i in reversed(range(count)):
            key, state, write = every[i], pi[i], pi_writes[i]
            # the state after the chunk
            d_end = (pi[i + 1] * d_pi).sum((1, 2))
            if rules.anchored:
                d_end -= d_pi.diagonal(dim1=1, dim2=2).sum(-1)
            n = key.k * key.until_end
            if d_written is None:
                d_write = torch.bmm(n, d_pi.mT)
            else:
                d_write = torch.baddbmm(d_written[i], n, d_pi.mT)
            # the triangular system
            y = torch.bmm(key.solve.mT, d_write)
            d_r = row_dot(y, write)
            w = y.mul_(key.r)
            if of_main is None:
                past = torch.bmm(write, d_pi)
                pairs = torch.baddbmm(key.solve, w, write.mT, beta=0, alpha=-1)
            else:
                assert of_main.pairs is not None and of_main.d_faded is not None, "Pi erases"
                past = torch.baddbmm(of_main.past[i], write, d_pi)
                pairs = torch.baddbmm(of_main.pairs[i], w, write.mT, alpha=-1)
                d_r.add_(of_main.d_r[i])
                d_end.add_(of_main.d_end[i])
            torch.mul(d_r, closed[i], out=d_made[i, ..., d : d + 1])
            d_pi.mul_(key.whole)
            if d_main is not None:
                d_pi.add_(d_main[i])
            # its right side
            d_target = torch.bmm(w, state)
            d_faded = w - d_target if rules.anchored else d_target.neg()
            if of_main is not None and of_main.d_faded is not None:
                d_faded.add_(of_main.d_faded[i])
            d_key = d_k[i] - w if rules.anchored else d_k[i]
            d_p, p = torch.bmm(w.mT, rest[i]), state
            if start is not None and i == 0:
                p = start
                d_target.baddbmm_(w, p - state)
                of_faded = torch.bmm(w.mT, key.faded)
                d_p.add_(of_faded)
                d_pi.sub_(of_faded)
            if rules.c != 0:
                d_key = torch.sub(d_key, d_target, alpha=rules.c)
            if v_scale is not None:
                _normalize_backward(d_target, u[i], v_scale[i], d_target)
            d_v_i = d_v[i].add_(d_target)
            _fill_backward(key, pairs, past, d_faded, d_key, d_g[i], d_end, open_[i], d_made[i])
            # what they are made with
            torch.bmm(d_made[i].mT, a[i], out=d_by[:, : d + 2])
            torch.bmm(d_v_i.mT, b[i], out=d_by[:, d + 2 :])
            d_p.baddbmm_(makers.mT, d_by)
            d_makers.baddbmm_(d_by, p.mT)
            if p is start:
                d_start = d_p
            else:
                d_pi.add_(d_p)
            if carried is not None:
                d_pi.mul_(carried[i])
        d_x, d_logits = d_made.split([d, 2], dim=-1)
        d_a = product(d_made, made[:, :, : d + 2], out=rest)  # their turn is over
        d_b = product(d_v, made[:, :, d + 2 :], out=None if of_main is None else of_main.past)
        if ctx.additive:
            d_a.add_(d_x)
            d_b.add_(d_v)
        d_current = d_pi if of_main is None else torch.cat([d_pi, of_main.d_state], 1)
        return d_a, d_b, d_logits, d_current, d_start, None, d_makers, None, None


def _empty_keys(a: Tensor, rules: MemoryRules) -> Keys:
    """To be filled."""
    count, batch, size, _ = a.shape
    whole, column = (count, batch, size), (count, batch, size, 1)
    return Keys(
        k=a.new_empty(a.shape),
        scale=a.new_empty(column),
        r=a.new_empty(column),
        g=a.new_zeros(count, batch, size + 1),
        since_start=a.new_empty(count, batch, size + 1, 1),
        fade=a.new_empty(count, batch, size + 1, size),
        solve=a.new_empty(*whole, size).mT  # as the solver wants to leave it
        if rules.erases
        else a.new_empty(count, batch, 0, 0),
        rules=rules,
    )


def _fill(keys: Keys, x: Tensor, alpha: Tensor, eta: Tensor, strength: float) -> None:
    """Keys [N, C, d] of what is to be normalised, and all that follows from them and the gates.

    The logits alpha are [N, C], and eta [N, C, 1].
    """
    size = x.shape[1]
    torch.mul(x, _inverse_norm(x, out=keys.scale), out=keys.k)
    torch.sigmoid(eta, out=keys.r)
    keys.r.mul_(strength)
    g, fade = keys.g, keys.fade
    torch.cumsum(F.logsigmoid(alpha), -1, out=g[:, 1:])
    torch.exp(g[..., None], out=keys.since_start)
    # what lies above is masked before exp, where it may overflow
    torch.sub(g[:, :, None], g[:, None, 1:], out=fade).add_(_above(size, x.dtype, x.device)).exp_()
    if not keys.rules.erases:
        return
    coupling = torch.bmm(keys.k, keys.k.mT).mul_(keys.fade_before).mul_(keys.r)
    eye = _eye(size, x.dtype, x.device).expand_as(coupling)
    torch.linalg.solve_triangular(
        coupling, eye, upper=False, unitriangular=True, out=keys.solve
    )  # unitriangular: the ones of I + diag(r) W are not stored


def _fill_backward(
    keys: Keys,
    pairs: Tensor | None,
    past: Tensor,
    d_faded: Tensor | None,
    d_key: Tensor,
    d_g: Tensor,
    d_end: Tensor,
    open_: Tensor,
    d_made: Tensor,
) -> None:
    """Fill dx and d logit of alpha, of [dx | d eta | d alpha] [N, C, d + 2].

    Args:
        keys: of N chunks.
        pairs: -w D^T, [N, C, C]; overwritten, as are `past`, `d_faded` and `d_g`.
        past: D dZ', [N, C, d].
        d_faded: df, likewise; as `pairs` None where writes erase nothing.
        d_key: what dk is beside A and B, likewise.
        d_g: from the reads, [N, C + 1].
        d_end: what is added to dg_C, [N].
        open_: derivative of g by the logit of its decay, [N, C].
    """
    k, size, d = keys.k, *keys.k.shape[1:]
    past.mul_(keys.until_end)
    now = None
    if pairs is not None and d_faded is not None:
        pairs.mul_(keys.fade_before)
        if keys.rules.decayed_write:
            pairs.diagonal(dim1=1, dim2=2).zero_()  # F" has ones there; no write erases itself
        past.baddbmm_(pairs.mT, k)
        now = d_faded.mul_(keys.before).baddbmm_(pairs, k)
        d_g[:, keys.erased].add_(row_dot(k, now)[..., 0])
    d_g[:, 1:].sub_(row_dot(k, past)[..., 0])
    d_g[:, -1].add_(d_end)
    torch.mul(d_g @ _up_to(size, k.dtype, k.device), open_, out=d_made[..., d + 1])
    past = past if now is None else past.add_(now)
    _normalize_backward(past.add_(d_key), k, keys.scale, d_made[..., :d])


@lru_cache(maxsize=4)
def _eye(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


@lru_cache(maxsize=4)
def _above(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf above the diagonal of F, else 0."""
    above = torch.full((size + 1, size), float("-inf"), dtype=dtype, device=device)
    return above.triu()


@lru_cache(maxsize=4)
def _up_to(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which decays g_0 .. g_C hold, 0 or 1, [C + 1, C]."""
    return torch.ones(size + 1, size, dtype=dtype, device=device).tril(-1)


def _inverse_norm(x: Tensor, out: Tensor) -> Tensor:
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=out)
    return out.square_().add_(NORMALIZE_EPS).rsqrt_()


def _target(u: Tensor, k: Tensor, rules: MemoryRules) -> Tensor:
    """u - c k, of which Pi at the start of the chunk makes what Pi is to learn."""
    return u if rules.c == 0 else torch.sub(u, k, alpha=rules.c)


def _times_pi(target: Tensor, faded: Tensor, pi: Tensor, p: Tensor) -> Tensor:
    """(u - c k) P^T - f Pi^T."""
    right = torch.bmm(target - faded, pi.mT)
    return right if p is pi else right.baddbmm_(target, (p - pi).mT)


def _normalize_backward(d_unit: Tensor, unit: Tensor, scale: Tensor, out: Tensor) -> None:
    """Derivative by x of unit = x scale, scale = 1 / sqrt(|x|^2 + eps)."""
    torch.mul(torch.addcmul(d_unit, unit, row_dot(unit, d_unit), value=-1), scale, out=out)

"""The golden reference of the self-modifying memory: token by token, in float64, as written.

Slow and plain on purpose: `nlscale.ops.memory.scan` and every kernel are compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.ops.memory.rules import (
    NORMALIZE_EPS,
    STATE_EPS,
    MainWeights,
    MemoryRules,
    MemoryWeights,
)


def memory_reference(
    a: Tensor,
    b: Tensor,
    q: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: MemoryWeights | None,
    rules: MemoryRules,
    main: MainWeights | None = None,
) -> Tensor:
    """The recurrence of docs/concepts/memory.md, Eq. 93 and what is chosen beside it, by token.

    Arguments and result are those of `nlscale.ops.memory.scan.memory_scan`, in float64. The
    memories themselves are updated, not the transfer matrix:
    M_t = M_{t-1} (alpha I - eta k k^T) - ...
    """
    batch, heads, length, d = a.shape
    rows = []
    for i in range(batch):
        for h in range(heads):
            rows.append(_one_head(i, h, a, b, q, eta, alpha, weights, rules, main))
    return torch.stack(rows).view(batch, heads, length, d)


def _one_head(
    i: int,
    h: int,
    a: Tensor,
    b: Tensor,
    q: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: MemoryWeights | None,
    rules: MemoryRules,
    extra: MainWeights | None,
) -> Tensor:
    d = a.shape[-1]
    zero = torch.zeros(d, d, dtype=torch.float64, device=a.device)
    main = zero
    learned = None
    if weights is not None:
        parts = [weights.key[h], weights.value[h], weights.gates[h]]
        if weights.read is not None:
            parts.append(weights.read[h])
        learned = torch.cat(parts).double()
    stacked = learned  # [M_k; M_v; m_eta; m_alpha; (M_m)], [rows, d]
    at_start = stacked
    main_at_start = begun_with = momentum = zero  # S now and, faded, of the chunk's start; m
    p = torch.ones((), dtype=torch.float64, device=a.device)
    reads = []
    for t in range(a.shape[2]):
        if t % rules.chunk == 0:
            if rules.chunk_momentum and t:
                assert extra is not None
                assert extra.momentum_decay is not None and extra.momentum_weight is not None
                beta = torch.sigmoid(extra.momentum_decay[h].double())
                momentum = beta * momentum + (main - begun_with)
                main = main + extra.momentum_weight[h].double() * momentum
            at_start, main_at_start, begun_with = stacked, main, main
        at, bt, qt = a[i, h, t].double(), b[i, h, t].double(), q[i, h, t].double()
        eta_logit, alpha_logit = eta[i, h, t].double(), alpha[i, h, t].double()
        k, v = at, bt
        if weights is not None:
            assert at_start is not None and stacked is not None and learned is not None
            k, v = at_start[:d] @ at, at_start[d : 2 * d] @ bt
            of_eta, of_alpha = _rows(at_start[2 * d :], eta_logit, alpha_logit)
            eta_logit, alpha_logit = eta_logit + of_eta @ at, alpha_logit + of_alpha @ at
            if weights.lambda_key is not None and weights.lambda_value is not None:
                k = at + weights.lambda_key[h].double() * k
                v = bt + weights.lambda_value[h].double() * v
        if rules.reads_state:
            assert extra is not None and extra.state_weight is not None
            assert extra.state_key is not None and extra.state_value is not None
            assert extra.state_gates is not None
            s = main_at_start @ qt
            s = s / torch.sqrt(s @ s / d + STATE_EPS)
            by_key, by_value, by_gates = extra.state_weight[h].double().unbind()
            k = k + by_key * extra.state_key[h].double() @ s
            v = v + by_value * extra.state_value[h].double() @ s
            of_eta, of_alpha = _rows(extra.state_gates[h].double(), eta_logit, alpha_logit)
            eta_logit = eta_logit + by_gates * of_eta @ s
            alpha_logit = alpha_logit + by_gates * of_alpha @ s
        if rules.kalman_gain:
            assert extra is not None and extra.noise is not None
            expected = torch.sigmoid(alpha_logit) ** 2 * p + torch.exp(extra.noise[h].double())
            gain = expected / (torch.exp(-eta_logit) + expected)
            p = expected * (1 - gain / d)
            eta_logit = eta_logit + torch.log(expected)
        k = _unit(k)
        e, al = rules.strength * torch.sigmoid(eta_logit), torch.sigmoid(alpha_logit)
        if rules.channel_gates:
            stacked, main, read = _by_channel(
                (k, v, qt, e[:d], e[d:], al), stacked, at_start, learned, main, rules
            )
            begun_with = begun_with * al
            reads.append(read)
            continue
        erase = e * torch.outer(k, k) * rules.erases
        if rules.decayed_write:
            erase = al * erase
        forget = al * torch.eye(d, dtype=torch.float64, device=a.device) - erase
        if stacked is not None and at_start is not None and learned is not None:
            target = _unit(v) if rules.normalize_value else v
            error = at_start @ (rules.c * k - target)  # M k - vhat, vhat = M v
            stacked = stacked @ forget - e * torch.outer(error, k)
            if rules.anchored:
                anchor = (1 - al) * learned
                if rules.decayed_write:  # what has decayed toward it is what is erased
                    anchor = anchor - e * torch.outer(anchor @ k, k)
                stacked = stacked + anchor
        if rules.main_memory:
            main = main @ forget + e * torch.outer(v, k)
            begun_with = al * begun_with
            reads.append(main @ qt)
        else:
            assert stacked is not None
            reads.append(stacked[2 * d + 2 :] @ qt)
    return torch.stack(reads)


def _by_channel(
    token: tuple[Tensor, ...],
    stacked: Tensor | None,
    at_start: Tensor | None,
    learned: Tensor | None,
    main: Tensor,
    rules: MemoryRules,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A token whose gates are vectors: the memories that make k, v and the gates, S, and the read.

    S_t = S_{t-1} Diag(alpha) (I - (b o k) k^T) + (w o v) k^T, and of the others likewise what has
    decayed, anchored, with M (w o (u - c k)) for w o v.
    """
    k, v, q, b, w, alpha = token
    keep, eye = torch.diag(alpha), torch.eye(len(k), dtype=k.dtype, device=k.device)
    erase = eye - torch.outer(b * k, k)
    if stacked is not None:
        assert at_start is not None and learned is not None
        u = _unit(v) if rules.normalize_value else v
        target = at_start @ (w * (u - rules.c * k))
        decayed = stacked @ keep
        if rules.anchored:
            decayed = decayed + learned @ (eye - keep)
        stacked = decayed @ erase + torch.outer(target, k)
    main = main @ keep @ erase + torch.outer(w * v, k)
    return stacked, main, main @ q


def _rows(gates: Tensor, eta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Of a memory of gates those that make eta and alpha: one each, or one a channel."""
    of_eta, of_alpha = gates[: eta.numel()], gates[eta.numel() : eta.numel() + alpha.numel()]
    return of_eta.view(*eta.shape, -1), of_alpha.view(*alpha.shape, -1)


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt(x @ x + NORMALIZE_EPS)

"""The writes to the main memory S where it is a state of its own, once keys and decays are known.

Part of the chunk form (docs/concepts/memory.md), in the notation of `nlscale.ops.memory.chunk`.
Only the states follow one another: three products a chunk forward and three backward,

    D = T diag(r) (v - f S^T)            S' = exp(g_C) S + D^T n

and all that the derivatives dS' of the states after each chunk are needed for is made of them for
all chunks at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlscale.ops.memory.rules import MemoryRules


@dataclass(frozen=True)
class Keys:
    """Of n chunks of C tokens, and N = batch * heads."""

    k: Tensor
    """[n, N, C, d]."""
    scale: Tensor
    """1 / |x|, [n, N, C, 1]."""
    r: Tensor
    """Write strengths, [n, N, C, 1]."""
    g: Tensor
    """g_0 .. g_C, [n, N, C + 1]."""
    since_start: Tensor
    """Its exp, [n, N, C + 1, 1]."""
    fade: Tensor
    """F, [n, N, C + 1, C]."""
    solve: Tensor
    """T, [n, N, C, C]; empty where writes erase nothing, which makes it the identity."""
    rules: MemoryRules

    @classmethod
    def of(cls, tensors: Iterable[Tensor], rules: MemoryRules) -> Keys:
        """Of `all`."""
        fields: tuple[Any, ...] = (*tensors, rules)
        return cls(*fields)

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.k, self.scale, self.r, self.g, self.since_start, self.fade, self.solve

    def each(self) -> Iterator[Keys]:
        """Those of one chunk after the other, without the first dimension."""
        for of_chunk in zip(*(x.unbind(0) for x in self.all), strict=True):
            yield Keys.of(of_chunk, self.rules)

    def flat(self) -> Keys:
        """All as if they were of one chunk of n N sequences."""
        return Keys.of((x.flatten(0, 1) for x in self.all), self.rules)

    @property
    def erased(self) -> slice:
        """Of g_0 .. g_C those by which what each write erases has decayed."""
        return slice(1, None) if self.rules.decayed_write else slice(0, -1)

    @property
    def before(self) -> Tensor:
        """exp of them: of g_0 .. g_{C-1}, or of g_1 .. g_C."""
        return self.since_start[..., self.erased, :]

    @property
    def fade_before(self) -> Tensor:
        """F', the same rows of F, [n, N, C, C]."""
        return self.fade[..., self.erased, :]

    @property
    def whole(self) -> Tensor:
        """exp(g_C), [n, N, 1, 1]."""
        return self.since_start[..., -1:, :]

    @property
    def faded(self) -> Tensor:
        """f, made when it is asked for."""
        return self.k * self.before

    @property
    def until_end(self) -> Tensor:
        """F_C, [n, N, C, 1]."""
        return self.fade[..., -1, :, None]


@dataclass
class Shares:
    """What S contributes to the derivatives that it shares with Pi, for all chunks at once."""

    d_v: Tensor
    """w = diag(r) T^T dD, [n, N, C, d]."""
    d_r: Tensor
    """Of the logits of r, but for a factor 1 - r, [n, N, C, 1]."""
    pairs: Tensor | None
    """-w D^T, [n, N, C, C]; None where writes erase nothing."""
    past: Tensor
    """D dS', [n, N, C, d]."""
    d_faded: Tensor | None
    """df = -w S, likewise; None where writes erase nothing."""
    d_end: Tensor
    """S' . dS', [n, N]."""
    d_state: Tensor
    """By S at the start of the first chunk, [N, d, d]."""


def write(keys: Keys, v: Tensor, carried: Tensor | None, states: Tensor, writes: Tensor) -> None:
    """Fill what is written, D [n, N, C, d], and the states [n + 1, N, d, d], of which the first is
    given."""
    if not keys.rules.erases:
        _add(keys, v, carried, states, writes)
        return
    solve, whole = keys.solve * keys.r.mT, keys.whole
    faded, n = keys.faded, keys.k * keys.until_end
    parts = zip(v, faded, solve, n, whole, states, states[1:], writes, strict=False)
    for i, (v_i, faded_i, solve_i, n_i, whole_i, state, after, written) in enumerate(parts):
        if carried is not None:
            state.mul_(carried[i])
        torch.bmm(solve_i, torch.baddbmm(v_i, faded_i, state.mT, alpha=-1), out=written)
        torch.mul(state, whole_i, out=after)
        after.baddbmm_(written.mT, n_i)


def _add(keys: Keys, v: Tensor, carried: Tensor | None, states: Tensor, writes: Tensor) -> None:
    """The same where nothing is erased: D = diag(r) v."""
    torch.mul(v, keys.r, out=writes)
    added = product(writes.mT, keys.k * keys.until_end)
    for i, whole in enumerate(keys.whole):
        if carried is not None:
            states[i].mul_(carried[i])
        torch.addcmul(added[i], states[i], whole, out=states[i + 1])


def write_backward(
    keys: Keys,
    states: Tensor,
    writes: Tensor,
    carried: Tensor | None,
    d_last: Tensor | None,
    d_main: Tensor | None,
    d_written: Tensor | None,
) -> Shares:
    """From the derivatives by the last state, the states and the writes; None: there is none."""
    erases, n, whole = keys.rules.erases, keys.k * keys.until_end, keys.whole
    faded = keys.faded if erases else n
    y, d_states = writes.new_empty(writes.shape), states.new_empty(states.shape)
    if d_last is None:
        d_states[-1].zero_()
    else:
        d_states[-1] = d_last
    for i in reversed(range(len(y))):
        d_after, d_state = d_states[i + 1], d_states[i]
        if d_written is None:
            d_write = torch.bmm(n[i], d_after.mT)
        else:
            d_write = torch.baddbmm(d_written[i], n[i], d_after.mT)
        if erases:
            torch.bmm(keys.solve[i].mT, d_write, out=y[i])
        else:
            y[i] = d_write
        torch.mul(d_after, whole[i], out=d_state)
        if d_main is not None:
            d_state.add_(d_main[i])
        if erases:
            w = torch.mul(y[i], keys.r[i], out=d_write)
            d_state.baddbmm_(w.mT, faded[i], alpha=-1)
        if carried is not None:
            d_state.mul_(carried[i])
    past = product(writes, d_states[1:], out=n)
    d_end = (states[1:] * d_states[1:]).sum((2, 3))
    d_r = row_dot(y, writes)
    w = y.mul_(keys.r)
    return Shares(
        d_v=w,
        d_r=d_r,
        pairs=product(w, writes.mT).neg_() if erases else None,
        past=past,
        d_faded=product(w, states[:-1], out=faded).neg_() if erases else None,
        d_end=d_end,
        d_state=d_states[0].clone(),
    )


def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x y of matrices that are stacked twice, [n, N, rows, ...]."""
    into = None if out is None else out.flatten(0, 1)
    made = torch.bmm(x.flatten(0, 1), y.flatten(0, 1), out=into)
    return made.view(*x.shape[:2], *made.shape[1:])


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row; the dimension is kept."""
    return (x * y).sum(-1, keepdim=True)

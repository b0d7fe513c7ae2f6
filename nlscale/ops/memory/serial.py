"""The scan of a memory whose writes depend on more than tokens and Pi, chunk by chunk.

Four things, each by itself or together, of a main memory S that is a state of its own
(docs/concepts/memory.md):

- *state-read* (`MemoryRules.reads_state`): what the queries read off S at the start of the chunk,
  s_t = S_s q_t brought to unit mean square, is added to what makes k, v and the gates;
- *Kalman gain* (`kalman_gain`): the write strength of a token follows from how uncertain the
  memory is, a number a head (`nlscale.ops.memory.gain`);
- *momentum over chunks* (`chunk_momentum`): at the end of a chunk, with U what it has written,
  m <- beta m + U and S <- S + gamma m;
- *gates of channels* (`channel_gates`): decay and write strengths are vectors
  (`nlscale.ops.memory.gates`). There is no gain of them.

So everything of a chunk waits for the one before, and only what a chunk begins with is kept: the
backward pass computes each chunk again, and differentiates it by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.memory.gain import KalmanGain
from nlscale.ops.memory.gates import ChannelGates, HeadGates
from nlscale.ops.memory.rules import (
    NORMALIZE_EPS,
    STATE_EPS,
    MainWeights,
    MemoryRules,
    MemoryWeights,
)

End = bool | Tensor
"""Whether a chunk ends; of each row, bool [batch, 1, 1, 1], where they differ."""


class Memories(NamedTuple):
    """What is carried from chunk to chunk, [batch, heads, d, d] each but the gain's; None: there is
    none, or it is as at the start of a chunk."""

    main: Tensor
    """S."""
    main_start: Any
    """S at the start of the chunk."""
    pi: Tensor | None
    pi_start: Tensor | None
    uncertainty: Tensor | None
    """p of the Kalman gain, [batch, heads]."""
    momentum: Tensor | None
    """m."""
    since: Tensor | None
    """U, what was written since the chunk began; None: nothing."""

    def renewed(self, end: End, weights: Weights) -> Memories:
        """After a chunk, or a part of one: where it ends, another begins."""
        if end is False:
            return self
        main, momentum = self.main, self.momentum
        if momentum is not None:
            assert weights.momentum_decay is not None and weights.momentum_weight is not None
            momentum = torch.sigmoid(weights.momentum_decay)[:, None, None] * momentum
            momentum = momentum if self.since is None else momentum + self.since
            main = main + weights.momentum_weight[:, None, None] * momentum
        over = Memories(main, main, self.pi, self.pi, self.uncertainty, momentum, None)
        if end is True:
            return over
        chosen: Any = (_where(end, *x) for x in zip(over, self, strict=True))
        since = None if self.since is None else self.since.masked_fill(end, 0)
        return Memories(*chosen)._replace(since=since)

    def anew(self, carried: Tensor) -> Memories:
        """At the start of a chunk, with those of some rows begun anew; carried [batch] is 0 there,
        and 1 elsewhere."""
        by_row = carried[:, None, None, None].to(self.main.dtype)
        main, pi = self.main * by_row, self.pi
        if pi is not None:
            eye = torch.eye(pi.shape[-1], dtype=pi.dtype, device=pi.device)
            pi = pi * by_row + (1 - by_row) * eye
        uncertainty, momentum = self.uncertainty, self.momentum
        if uncertainty is not None:
            uncertainty = uncertainty * by_row[..., 0, 0] + (1 - by_row[..., 0, 0])
        if momentum is not None:
            momentum = momentum * by_row
        return Memories(main, main, pi, pi, uncertainty, momentum, None)


class Weights(NamedTuple):
    """All that is learned, in at least fp32; of `MemoryWeights` and `MainWeights`."""

    key: Tensor | None
    value: Tensor | None
    gates: Tensor | None
    lambda_key: Tensor | None
    lambda_value: Tensor | None
    state_key: Tensor | None
    state_value: Tensor | None
    state_gates: Tensor | None
    state_weight: Tensor | None
    noise: Tensor | None
    momentum_decay: Tensor | None
    momentum_weight: Tensor | None

    @classmethod
    def of(cls, weights: MemoryWeights | None, main: MainWeights, dtype: torch.dtype) -> Weights:
        found = {}
        for name in cls._fields:
            given = getattr(main, name, None)
            if weights is not None and given is None:
                given = getattr(weights, name, None)
            found[name] = None if given is None else given.to(dtype)
        return cls(**found)


class Tokens(NamedTuple):
    """Of some chunks, or of one, [batch, heads, time, d]."""

    a: Tensor
    b: Tensor
    q: Tensor
    eta: Tensor
    """Logits, without d; of gates of channels those of b and of w, 2 d."""
    alpha: Tensor
    """Logits, without d; of gates of channels d."""


@dataclass(frozen=True)
class Course:
    """How a run goes: what is not differentiated."""

    rules: MemoryRules
    size: int
    """Tokens of each chunk."""
    ends: Sequence[End]
    """Of each chunk, whether it does."""
    stands: Tensor | None
    """Where there is a token, bool [batch, time]; None: everywhere."""
    carried: Tensor | None
    """0 at chunks before which a row starts anew, else 1, [batch, chunks]; None: it never does."""

    def chunk(
        self, i: int, tokens: Tokens, memories: Memories, weights: Weights
    ) -> tuple[Tensor, Memories]:
        """What chunk i reads, and what is carried after it; `tokens` are its own."""
        if self.carried is not None:
            memories = memories.anew(self.carried[:, i])
        stands = self.stands
        if stands is not None:
            stands = stands[:, None, i * self.size : (i + 1) * self.size]
        read, memories = _chunk(self.rules, tokens, memories, weights, stands)
        return read, memories.renewed(self.ends[i], weights)


def begin(a: Tensor, dtype: torch.dtype, rules: MemoryRules) -> dict[str, Tensor | None]:
    """Those fields of `MemoryState`, of a sequence that begins, that other memories have not."""
    batch, heads, _, d = a.shape
    zeros = a.new_zeros(batch, heads, d, d, dtype=dtype)
    ones = a.new_ones(batch, heads, dtype=dtype)
    return {
        "main_start": zeros if rules.reads_state else None,
        "uncertainty": ones if rules.kalman_gain else None,
        "momentum": zeros if rules.chunk_momentum else None,
        "since": zeros if rules.chunk_momentum else None,
    }


def serial_run(
    course: Course, tokens: Tokens, memories: Memories, weights: Weights
) -> tuple[Tensor, Memories]:
    """Consecutive chunks of equal size: what they read, [batch, heads, time, d], and what is
    carried after them."""
    read, *after = SerialRun.apply(course, *tokens, *memories, *weights)
    carried = Memories(*after)
    if course.ends[-1] is True:  # the same tensors, which are then kept once
        carried = carried._replace(main_start=carried.main, pi_start=carried.pi)
    return read, carried


class SerialRun(torch.autograd.Function):
    """Keeps the tokens and what each chunk begins with."""

    @staticmethod
    def forward(ctx: Any, course: Course, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, memories, weights = _sorted(given)
        reads, begins = [], []
        for i, part in enumerate(_parts(tokens, course.size)):
            begins.append(memories)
            read, memories = course.chunk(i, part, memories, weights)
            reads.append(read)
        ctx.course = course
        ctx.save_for_backward(*tokens, *weights, *(x for begin in begins for x in begin))
        ctx.set_materialize_grads(False)
        if course.ends[-1] is True:
            memories = memories._replace(main_start=None, pi_start=None)
        # an output of its own for each, as autograd wants of what was given
        return torch.cat(reads, 2), *(None if x is None else x.clone() for x in memories)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_reads: Tensor | None, *d_after: Tensor | None) -> Any:
        course, saved = ctx.course, ctx.saved_tensors
        n_tokens, n_weights = len(Tokens._fields), len(Weights._fields)
        tokens, weights = Tokens(*saved[:n_tokens]), saved[n_tokens : n_tokens + n_weights]
        weights = Weights(*(_leaf(x) for x in weights))
        begins = [*zip(*[iter(saved[n_tokens + n_weights :])] * len(Memories._fields), strict=True)]
        parts = [*_parts(tokens, course.size)]
        d_tokens: list[Any] = [None] * len(parts)
        d_weights: list[Any] = [None] * n_weights
        d_memories: Sequence[Tensor | None] = d_after
        d_read_of = [None] * len(parts) if d_reads is None else d_reads.split(course.size, 2)
        for i in reversed(range(len(parts))):
            part, before = Tokens(*map(_leaf, parts[i])), Memories(*map(_leaf, begins[i]))
            with torch.enable_grad():
                read, after = course.chunk(i, part, before, weights)
            made = [
                (x, d)
                for x, d in zip((read, *after), (d_read_of[i], *d_memories), strict=True)
                if x is not None and d is not None and x.requires_grad
            ]
            leaves = (*part, *before, *weights)
            found = _gradients(made, leaves)
            d_tokens[i] = found[:n_tokens]
            d_memories = found[n_tokens:-n_weights]
            for place, d in enumerate(found[-n_weights:]):
                if d is not None:
                    held = d_weights[place]
                    d_weights[place] = d if held is None else held.add_(d)
        joined = [
            torch.cat([_filled(d, x) for d, x in zip(each, of, strict=True)], 2)
            for each, of in zip(zip(*d_tokens, strict=True), zip(*parts, strict=True), strict=True)
        ]
        return None, *joined, *d_memories, *d_weights


def _chunk(
    rules: MemoryRules, tokens: Tokens, memories: Memories, weights: Weights, stands: Tensor | None
) -> tuple[Tensor, Memories]:
    """The chunk form of docs/concepts/memory.md, of one chunk or a part of one."""
    a, b, q, eta, alpha = tokens
    x, v = a, b
    if weights.key is not None:
        x, v, eta, alpha = _made_by_pi(tokens, memories, weights)
    if rules.reads_state:
        x, v, eta, alpha = _with_state((x, v, eta, alpha), q, memories, weights)
    uncertainty = memories.uncertainty
    if rules.kalman_gain:
        eta, uncertainty = KalmanGain.apply(
            eta, alpha, weights.noise, uncertainty, stands, a.shape[-1]
        )
    gates = (ChannelGates if rules.channel_gates else HeadGates)(_unit(x), q, eta, alpha, rules)
    k, whole = gates.k, gates.whole
    pi = memories.pi
    if pi is not None:
        assert memories.pi_start is not None
        u = _unit(v) if rules.normalize_value else v
        target = gates.weighed(u - rules.c * k) @ memories.pi_start.mT
        written = gates.written(target, pi, rules.anchored)
        pi = whole * pi + gates.added(written)
        if rules.anchored:
            eye = torch.eye(pi.shape[-1], dtype=pi.dtype, device=pi.device)
            pi = pi + (1 - whole) * eye
    main = memories.main
    writes = gates.written(gates.weighed(v), main)
    read, added = gates.read(main, writes), gates.added(writes)
    since = memories.since
    if rules.chunk_momentum:
        since = added if since is None else whole * since + added
    main_start, pi_start = memories.main_start, memories.pi_start
    main = whole * main + added
    return read, Memories(main, main_start, pi, pi_start, uncertainty, memories.momentum, since)


def _made_by_pi(
    tokens: Tokens, memories: Memories, weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What k is the direction of, v, and the logits of the gates."""
    a, b, _, eta, alpha = tokens
    key, value, gates, start = weights.key, weights.value, weights.gates, memories.pi_start
    assert key is not None and value is not None and gates is not None and start is not None
    assert weights.lambda_key is not None and weights.lambda_value is not None
    key = weights.lambda_key[:, None, None] * key
    value = weights.lambda_value[:, None, None] * value
    logits = a @ (gates @ start).mT
    x, v = a + a @ (key @ start).mT, b + b @ (value @ start).mT
    return x, v, *_with_logits(eta, alpha, logits)


def _with_state(
    made: tuple[Tensor, Tensor, Tensor, Tensor], q: Tensor, memories: Memories, weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and what the queries read off S at the start of the chunk."""
    x, v, eta, alpha = made
    s = q @ memories.main_start.mT
    s = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + STATE_EPS)
    assert weights.state_weight is not None and weights.state_key is not None
    assert weights.state_value is not None and weights.state_gates is not None
    by_key, by_value, by_gates = weights.state_weight[:, :, None, None].unbind(1)
    logits = s @ (by_gates * weights.state_gates).mT
    x, v = x + s @ (by_key * weights.state_key).mT, v + s @ (by_value * weights.state_value).mT
    return x, v, *_with_logits(eta, alpha, logits)


def _with_logits(eta: Tensor, alpha: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the gates, with what the memory makes of them, side by side, [..., both]."""
    of_eta, of_alpha = logits.split([eta.shape[3:].numel(), alpha.shape[3:].numel()], -1)
    return eta + of_eta.reshape(eta.shape), alpha + of_alpha.reshape(alpha.shape)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORMALIZE_EPS)


def _sorted(given: Sequence[Tensor | None]) -> tuple[Tokens, Memories, Weights]:
    first, second = len(Tokens._fields), len(Tokens._fields) + len(Memories._fields)
    tokens: Any = given[:first]
    memories: Any = given[first:second]
    return Tokens(*tokens), Memories(*memories), Weights(*given[second:])


def _parts(tokens: Tokens, size: int) -> Any:
    """The tokens of each chunk."""
    return map(Tokens, *(x.split(size, dim=2) for x in tokens))


def _leaf(x: Any) -> Any:
    """Of a tensor or None."""
    return None if x is None else x.detach().requires_grad_()


def _gradients(
    made: list[tuple[Tensor, Tensor]], leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    present = [x for x in leaves if x is not None]
    if not made:
        return [None] * len(leaves)
    outputs, given = zip(*made, strict=True)
    found = iter(torch.autograd.grad(outputs, present, given, allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


def _filled(d: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if d is None else d


def _where(end: Tensor, over: Tensor | None, held: Tensor | None) -> Tensor | None:
    if over is None or held is None or over is held:
        return held
    return torch.where(end if over.dim() == 4 else end[..., 0, 0], over, held)

"""Sequences that levels go on learning from while they are read: `Model.learning`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.config.in_context import InContext
from nlscale.errors import UserError
from nlscale.generate.tokens import Tokens, known, shaped
from nlscale.model.changing import LevelChange, changing
from nlscale.model.decoder import Decoder
from nlscale.model.mixers.state import State
from nlscale.parallel.alone import alone

_COUNTS = "counts"


class LearningStream:
    """Sequences that are read piece by piece, and from which levels of objective `ntp` learn.

    Each sequence changes weights of its own. A chunk is over once the token after it is known; then
    its gradient is taken, from the state of the mixers in which it began, and the levels that are
    due change, before anything later is read. So what `feed` returns of a token is at weights that
    have not seen it, and pieces give what feeding at once gives, up to rounding. A piece that ends
    inside a chunk has that chunk read again by the next one.

    Attributes:
        batch: sequences
        levels: those that learn
        length: tokens that each has read since `begin`
    """

    def __init__(
        self, decoder: Decoder, vocabulary: int, batch: int, levels: Sequence[InContext]
    ) -> None:
        """See `nlscale.generate.model.Model.learning`."""
        if batch < 1:
            raise UserError(f"a stream of {batch} sequences; give batch=1 or more")
        self.batch, self.length = batch, 0
        self.chunk = min(each.chunk for each in levels)
        """Tokens of which a gradient is taken at once: those of the shortest chunk."""
        self.levels = list(levels)
        self._decoder, self._vocabulary = decoder, vocabulary
        self._device = next(decoder.parameters()).device
        self._levels = [LevelChange(decoder, each, batch) for each in levels]
        self._states: dict[str, State] | None = None
        self._open = torch.empty(batch, 0, dtype=torch.long, device=self._device)
        """Tokens since the chunk began, at most as many as it has."""

    def feed(self, tokens: Tokens) -> Tensor:
        """Read on.

        Args:
            tokens: the next of every sequence, [batch, n], n at least 1.

        Returns:
            -log p of each of these tokens, given those before it, in nats, fp32 (float64 where the
            model's weights are that) [batch, n] on the device of the model. Of the first token of a
            sequence there is none: NaN.

        Raises:
            UserError: tokens of another shape or type, beyond the vocabulary, or for another batch;
                or the mixer's state is no `nlscale.model.mixers.module.State`.
        """
        given = self._given(tokens)
        told = max(0, self._open.shape[1] - 1)  # targets of the open chunk that were returned
        found = []
        if not self._open.shape[1]:
            found.append(torch.full((self.batch, 1), torch.nan, device=self._device))
        pending = torch.cat([self._open, given], 1)
        with alone():
            while pending.shape[1] > self.chunk:
                found.append(self._close(pending[:, : self.chunk + 1])[:, told:])
                pending, told = pending[:, self.chunk :], 0
            if pending.shape[1] - 1 > told:
                with changing(self._levels), torch.no_grad():
                    found.append(self._read(pending)[0][:, told:])
        self._open = pending
        self.length += given.shape[1]
        return torch.cat([x.to(found[-1].dtype) for x in found], 1)

    def learn(self, tokens: Tokens) -> None:
        """Read on as `feed` does, and say nothing of it: of a chunk that is not over nothing is
        computed. Losses that are not returned so are not returned later.

        Raises:
            UserError: as `feed`.
        """
        pending = torch.cat([self._open, given := self._given(tokens)], 1)
        with alone():
            while pending.shape[1] > self.chunk:
                self._close(pending[:, : self.chunk + 1])
                pending = pending[:, self.chunk :]
        self._open = pending
        self.length += given.shape[1]

    @property
    def room(self) -> int:
        """Tokens that can be read before levels may change again; the next one may change them
        before it is read."""
        return self.chunk - self._open.shape[1] % self.chunk

    def changed(self) -> AbstractContextManager[list[Tensor]]:
        """Within, the model computes with what the sequences have changed so far."""
        return changing(self._levels)

    def begin(self) -> None:
        """Begin new sequences: mixers from their start, and levels from the trained weights but
        those that never do (`reset: never`), which first learn from the chunk that was open."""
        if self._open.shape[1] > 1:
            with alone():
                self._close(self._open)
        for level in self._levels:
            level.forget()
        self._states, self.length = None, 0
        self._open = self._open[:, :0]

    def clone(self) -> LearningStream:
        """Another stream that goes on from here, and leaves this one where it is."""
        other = LearningStream(self._decoder, self._vocabulary, self.batch, self.levels)
        other.length, other._open = self.length, self._open
        for mine, theirs in zip(self._levels, other._levels, strict=True):
            theirs.targets, theirs.tokens = mine.targets, mine.tokens
            own = [*mine.changes, *mine.sums]
            for x, y in zip(own, [*theirs.changes, *theirs.sums], strict=True):
                y.copy_(x)
        if self._states is not None:
            other._states = _copied(self._states, self.batch)
        return other

    def changes(self) -> dict[str, Tensor]:
        """What each sequence has changed, by the names of the parameters, [batch, *their shape]."""
        names = {id(module): name for name, module in self._decoder.named_modules()}
        found = {}
        for level in self._levels:
            for i, mlp in enumerate(level._mlps):
                for j, part in enumerate(("up", "down")):
                    found[f"{names[id(mlp)]}.{part}.weight"] = level.changes[2 * i + j]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for `Model.learning(tensors=...)`."""
        counts = [self.length, *(n for x in self._levels for n in (x.targets, x.tokens))]
        held = {_COUNTS: torch.tensor(counts), "open": self._open}
        for i, level in enumerate(self._levels):
            for kind, of in (("changes", level.changes), ("sums", level.sums)):
                held |= {f"levels.{i}.{kind}.{j}": x for j, x in enumerate(of)}
        for name, state in (self._states or {}).items():
            held |= {f"blocks.{name}.{key}": x for key, x in state.tensors().items()}
        return {k: x.detach().clone(memory_format=torch.contiguous_format) for k, x in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned of a stream of the same model, keys and batch.

        Raises:
            UserError: they are of another.
        """
        like = LearningStream(self._decoder, self._vocabulary, self.batch, self.levels)
        wanted = [set(like.tensors())]
        like.feed(torch.zeros(self.batch, self.chunk + 1, dtype=torch.long))
        wanted.append(set(like.tensors()))  # the states of mixers are there once a chunk is over
        fits = set(tensors) in wanted and all(
            x.shape == tensors[name].shape
            for name, x in like.tensors().items()
            if name.startswith("levels.") or name == _COUNTS
        )
        if not fits:
            raise UserError(
                "these are not the tensors of a stream of this model that learns by these keys, "
                f"with batch {self.batch}; give what tensors() returned of one"
            )
        self.length, *counts = tensors[_COUNTS].tolist()
        self._open = tensors["open"].to(self._device)
        for i, level in enumerate(self._levels):
            level.targets, level.tokens = counts[2 * i : 2 * i + 2]
            for kind, of in (("changes", level.changes), ("sums", level.sums)):
                for j, x in enumerate(of):
                    x.copy_(tensors[f"levels.{i}.{kind}.{j}"])
        self._states = None
        if any(name.startswith("blocks.") for name in tensors):
            assert like._states is not None
            self._states = {
                name: state.restored(
                    {key: tensors[f"blocks.{name}.{key}"] for key in state.form()}, self._device
                )
                for name, state in like._states.items()
            }

    def _given(self, tokens: Tokens) -> Tensor:
        given = known(shaped(tokens), self._vocabulary).to(self._device)
        if len(given) != self.batch:
            raise UserError(
                f"{len(given)} sequences are fed to a stream of {self.batch}; begin it with "
                f"model.learning(batch={len(given)})"
            )
        return given

    def _close(self, tokens: Tensor) -> Tensor:
        """Read a chunk and the token after it, and learn from it; the losses of its targets."""
        with torch.enable_grad(), changing(self._levels) as leaves:
            losses, states = self._read(tokens)
            gradients = iter(torch.autograd.grad(losses.sum(), leaves))
        self._states = _copied(states, self.batch)
        targets = tokens.shape[1] - 1
        for level in self._levels:
            level.add([next(gradients) for _ in level.changes], targets, targets)
        return losses.detach()

    def _read(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Losses of all but the first of n tokens, [batch, n - 1], and states before the last."""
        before = None if self._states is None else _copied(self._states, self.batch)
        x, states = self._decoder.hidden(tokens[:, :-1], before)
        logits = self._decoder.logits(x).transpose(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1), states


def _copied(states: Mapping[str, Any], batch: int) -> dict[str, State]:
    """States that share no memory with these, and know of no gradient.

    Raises:
        UserError: one cannot be copied.
    """
    every, found = torch.arange(batch), {}
    for name, state in states.items():
        if not isinstance(state, State):
            raise UserError(
                f"levels learn inside the context where the state of the mixer is a "
                f"nlscale.model.mixers.module.State, and that of block {name} is a "
                f"{type(state).__name__}; see docs/how-to/add-a-mixer.md"
            )
        with torch.no_grad():
            found[name] = state.select(every)
    return found

"""A model that goes on learning from the text that it reads and writes.

`Learner` takes the place of a `Model` in `nlscale.generate.text.Generation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nlscale.config.in_context import InContext
from nlscale.config.vocabulary import Config
from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError
from nlscale.generate import learned
from nlscale.generate.learned import keys_of
from nlscale.generate.learning import LearningStream
from nlscale.generate.model import Model
from nlscale.generate.stream import Stream
from nlscale.generate.text import Begun
from nlscale.generate.tokens import Integers, Tokens, counted, numbered, shaped

_LEARNER, _STREAM = "learner.", "stream."


class Learner:
    """A model whose levels of objective `ntp` learn from each text that it is given.

    The weights of the model stay as they are: what changes belongs to the texts.

    Args:
        model: as it was trained.
        levels: those that learn, at least one (`nlscale.generate.learned.levels_of`).
        file: what they have learned before, where one is there (`nlscale.generate.learned`): every
            text begins with that.

    Raises:
        UserError: the file cannot be read, or is of another model or other keys.
    """

    def __init__(self, model: Model, levels: Sequence[InContext], file: Path | None = None) -> None:
        self._model = model
        self._first = LearningStream(model._decoder, model.vocabulary, 1, levels)
        if file is not None and file.exists():
            learned.load(file, model, self._first)
            self._first.begin()

    @property
    def config(self) -> Config:
        return self._model.config

    @property
    def vocabulary(self) -> int:
        return self._model.vocabulary

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    @property
    def context(self) -> str:
        """What the levels learn by: their keys, as JSON."""
        return keys_of(self._first)

    def stream(self, batch: int = 1) -> LearningRows:
        """Sequences from their start."""
        return LearningRows([self._row(self._first.clone()) for _ in range(batch)])

    def stream_from(self, tensors: Mapping[str, Tensor]) -> LearningRows:
        """The sequence that `LearningRows.tensors` returned these of, exactly.

        Raises:
            UserError: they are not of one, or of one of another model or other keys.
        """
        parts = {
            prefix: {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
            for prefix in (_LEARNER, _STREAM)
        }
        row = self._row(self._first.clone())
        row.learner.restore(parts[_LEARNER])
        row.stream = self._model.stream_from(parts[_STREAM])
        if row.learner.length != int(row.stream.lengths[0]):
            raise UserError(
                f"these are not the tensors of a stream: {int(row.stream.lengths[0])} tokens were "
                f"read and {row.learner.length} learned from"
            )
        return LearningRows([row])

    def save(self, path: Path, begun: Begun) -> None:
        """Write what levels have learned from one text, for a `Learner` to begin with.

        Raises:
            UserError: it cannot be written.
        """
        assert isinstance(begun.stream, LearningRows), "a Learner has made it"
        (row,) = begun.stream.rows
        learned.save(path, self._model, row.learner)

    def _row(self, learner: LearningStream) -> _Row:
        return _Row(learner, self._model.stream())


class _Row:
    """A sequence: what is read of it by the weights as they are now, and what levels learn from it
    once a chunk is over."""

    def __init__(self, learner: LearningStream, stream: Stream) -> None:
        self.learner, self.stream = learner, stream

    def feed(self, tokens: Tensor, last: bool) -> Tensor:
        """As `Stream.feed` of one row."""
        found = []
        while tokens.shape[1]:
            piece = tokens[:, : self.learner.room]
            self.learner.learn(piece)  # the first of it may end a chunk, before it is read
            with self.learner.changed():
                found.append(self.stream.feed(piece, last=last))
            tokens = tokens[:, piece.shape[1] :]
        return found[-1] if last else torch.cat(found, 1)

    def clone(self) -> _Row:
        return _Row(self.learner.clone(), self.stream.clone())


class LearningRows:
    """Sequences that are read piece by piece, as by a `Stream`, and learned from; one after the
    other, so that each gives to the bit what it gives alone.

    The logits at a token are by weights that have learned from whole chunks before it alone.
    """

    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens that each has read, int64 [batch], on the CPU."""
        return torch.cat([row.stream.lengths for row in self.rows])

    @property
    def context(self) -> str:
        """See `Learner.context`."""
        return keys_of(self.rows[0].learner)

    def feed(self, tokens: Tokens, lengths: Integers | None = None, last: bool = False) -> Tensor:
        """Read on; arguments, result and errors as of `Stream.feed`."""
        tokens = shaped(tokens)
        if len(tokens) != self.batch:
            raise UserError(f"{len(tokens)} sequences are fed to a stream of {self.batch}")
        n, read = tokens.shape[1], counted(lengths, *tokens.shape)
        each = [n] * self.batch if read is None else read.tolist()
        found: list[Tensor | None] = [
            row.feed(ids[None, :count], last)[0] if count else None
            for row, ids, count in zip(self.rows, tokens, each, strict=True)
        ]
        like = next(x for x in found if x is not None)
        if last:
            return torch.stack([like.new_full(like.shape, torch.nan) if x is None else x
                                for x in found])  # fmt: skip
        whole = like.new_zeros(self.batch, n, like.shape[-1])
        for row, x in zip(whole, found, strict=True):
            if x is not None:
                row[: len(x)] = x
        return whole

    def select(self, rows: Integers) -> LearningRows:
        """Other sequences, copies of these in their order, that go on from here on their own."""
        return LearningRows([self.rows[i].clone() for i in numbered(rows, self.batch).tolist()])

    def anew(self) -> LearningRows:
        """The same sequences from their start; levels that are never reset keep what they know."""
        found = []
        for row in self.rows:
            learner = row.learner.clone()
            learner.begin()
            found.append(_Row(learner, row.stream.select([0])))
            found[-1].stream.reset([0])
        return LearningRows(found)

    def tensors(self) -> dict[str, Tensor]:
        """All that the one sequence holds, by name, for `Learner.stream_from`."""
        (row,) = self.rows
        return {
            **{_LEARNER + name: x for name, x in row.learner.tensors().items()},
            **{_STREAM + name: x for name, x in row.stream.tensors().items()},
        }

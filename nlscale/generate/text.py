"""Text that a model goes on with: several prompts and samples side by side, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nlscale.config.vocabulary import Config
from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError
from nlscale.generate.detokenize import Detokenizer, Stops
from nlscale.generate.sampling import Sampling, check_seed, chosen, number
from nlscale.generate.tokens import Integers, Tokens, is_whole, listed

TOKENS = 200
"""How many are generated unless said otherwise."""
PIECE = 2048
"""Tokens of a row that are read at a time."""
_RECENT = 16
"""The last ids of a sequence that are kept for its text: a character has 4 bytes at most."""

Prompt = str | Sequence[int]


class Rows(Protocol):
    """Sequences that are read: a `Stream`, or one from which levels learn."""

    @property
    def lengths(self) -> Tensor: ...

    @property
    def context(self) -> str: ...

    def feed(
        self, tokens: Tokens, lengths: Integers | None = None, last: bool = False
    ) -> Tensor: ...

    def select(self, rows: Integers) -> Rows: ...

    def anew(self) -> Rows: ...

    def tensors(self) -> dict[str, Tensor]: ...


class Speaker(Protocol):
    """What is asked of a model: a `nlscale.generate.model.Model` or
    `nlscale.generate.learner.Learner`."""

    @property
    def config(self) -> Config: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def stream(self, batch: int = 1) -> Rows: ...


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt."""

    prompt: str
    prompt_tokens: int
    """That were read, the separator in place of an empty prompt among them."""
    sample: int
    """Which of the samples of its prompt it is, from 0."""
    text: str
    """Without the prompt, without the text that stopped it, and without a last character of which
    only some bytes have come."""
    ids: list[int]
    """All that were generated, those of a stop or the end of text included."""
    log_probabilities: list[float]
    """Of each id: log p(id | all before it) in nats, as the model has it, whatever the sampling."""
    ended: str
    """Why: "tokens", as many as were asked for; "stop", a text that stops it came; "end of text",
    the separator of documents came; "interrupted", it was left before."""


@dataclass
class Begun:
    """A sequence to go on from later: all of it is in the model's state, but for its last token.

    Attributes:
        stream: of one row, that has read all tokens but the last
        recent: the last ids, at least one
        seen: bool [vocabulary], the tokens that occur in it
    """

    stream: Rows
    recent: list[int]
    seen: Tensor

    @property
    def tokens(self) -> int:
        """Of the sequence so far."""
        return int(self.stream.lengths[0]) + 1


@dataclass
class _Row:
    """A sequence while it is generated."""

    prompt: str
    prompt_tokens: int
    sample: int
    recent: list[int]
    read: int
    """Tokens of the sequence so far; of its document, where these are kept apart."""
    decoder: Detokenizer
    stops: Stops
    text: str = ""
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: str | None = None

    def take(self, token: int, log_probability: float, end: int, tokens: int) -> str:
        """The text that is new with it."""
        self.ids.append(token)
        self.recent = [*self.recent, token][-_RECENT:]
        self.read += 1
        self.log_probabilities.append(log_probability)
        new = self.stops.push(self.decoder.push(token))
        if self.stops.found:
            self.ended = "stop"
        elif token == end:
            self.ended = "end of text"
        elif len(self.ids) == tokens:
            self.ended = "tokens"
        if self.ended:
            new += self.stops.rest()
        self.text += new
        return new


class Generation:
    """Continuations of prompts that come token by token. `generate` is all of it in one call.

    First `reading` is to be gone through, then `writing`, which may be left at any time; then
    `results` says what came. Rows are the samples of the first prompt, then those of the second ...

    Ids that the tokenizer does not know, which fill up some models' vocabularies, are never drawn.
    A model that was trained on each document as if it stood alone (`data.document_mask`) begins
    anew at the last separator of what it is to read, and what comes before that changes nothing.

    Args:
        model: a `nlscale.generate.model.Model`, or a `nlscale.generate.learner.Learner`.
        prompts: texts, or token ids; an empty one stands for the separator of documents, after
            which a document begins. A text is read as it stands: no token is put before it.
        tokens: to generate of each at most; 0 only reads.
        samples: of each prompt. Sample i of a seed is the same whatever else is generated, up to
            draws that the rounding of logits decides.
        sampling: how tokens are chosen.
        stop: texts at the first of which a row ends.
        seed: of the draws, 0 to 2^64 - 1.
        begun: what the one prompt goes on from, where it may be empty; its stream is read on.

    Raises:
        UserError: an argument of another type or out of its range; ids or a text that the tokenizer
            does not know; there is no tokenizer.
    """

    def __init__(
        self,
        model: Speaker,
        prompts: str | Sequence[Prompt],
        tokens: int = TOKENS,
        samples: int = 1,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        begun: Begun | None = None,
    ) -> None:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        stop = [stop] if isinstance(stop, str) else stop
        _check(prompts, tokens, samples, seed, begun)
        self._model, self._seed, self._begun, self._tokens = model, seed, begun, tokens
        self._sampling, self._samples = sampling or Sampling(), samples
        tokenizer, before = model.tokenizer, begun.recent if begun else []
        self._ids = [self._encoded(prompt) for prompt in prompts]
        self._unread = [[*before[-1:], *ids] for ids in self._ids]
        past = begun.tokens - 1 if begun else 0
        stream = begun.stream if begun else None
        self._seen = torch.zeros(len(prompts), model.vocabulary, dtype=torch.bool)
        if model.config.data.document_mask:
            self._unread = [_last_document(ids, tokenizer.separator) for ids in self._unread]
            if begun and self._unread[0][0] == tokenizer.separator:
                stream, begun, before, past = begun.stream.anew(), None, [], 0
        if begun:
            self._seen |= begun.seen
        for row, ids in zip(self._seen, self._unread, strict=True):
            row[ids] = True
        self._seen = self._seen.repeat_interleave(samples, 0)
        self.rows = []
        for prompt, ids, unread in zip(prompts, self._ids, self._unread, strict=True):
            text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
            recent = [*before[:-1], *unread][-_RECENT:]
            for sample in range(samples):
                decoder, read = Detokenizer(tokenizer, recent), past + len(unread)
                row = _Row(text, len(ids), sample, recent, read, decoder, Stops(stop))
                row.ended = None if tokens else "tokens"
                self.rows.append(row)
        self._stream: Rows = stream or model.stream(len(prompts))
        self._active = [row for row in self.rows if row.ended is None]
        self._has_read: bool | None = False
        """None while it reads."""

    @property
    def prompt_tokens(self) -> int:
        """That `reading` reads, of all prompts."""
        return sum(len(ids) - 1 for ids in self._unread)

    def reading(self, piece: int | None = None) -> Iterator[int]:
        """Read all tokens of the prompts but the last ones; yields how many after each piece.

        Args:
            piece: tokens of a row at a time; None: `PIECE`.

        Raises:
            UserError: it has begun before.
        """
        if self._has_read is not False:
            raise UserError("the prompts have been read; make another Generation to read anew")
        self._has_read = None
        piece = piece or PIECE
        for start in range(0, max(len(ids) for ids in self._unread) - 1, piece):
            parts = [ids[start : min(start + piece, len(ids) - 1)] for ids in self._unread]
            lengths = [len(part) for part in parts]
            most = max(lengths)
            padded = torch.tensor([part + [0] * (most - len(part)) for part in parts])
            ragged = None if min(lengths) == most else torch.tensor(lengths)
            self._stream.feed(padded, ragged, last=True)
            yield sum(lengths)
        if self._samples > 1:
            prompts = range(len(self._unread))
            self._stream = self._stream.select([p for p in prompts for _ in range(self._samples)])
        self._has_read = True

    def writing(self) -> Iterator[list[tuple[int, str]]]:
        """Generate; yields after each token of all rows those that have new text, with the text.

        Raises:
            UserError: `reading` is not over; or the model gives logits that are not finite.
        """
        if not self._has_read:
            raise UserError("the prompts are not read yet; go through reading() to its end first")
        end, known = self._model.tokenizer.separator, self._model.tokenizer.vocabulary
        place = {id(row): index for index, row in enumerate(self.rows)}
        while self._active:
            logits = self._stream.feed([row.recent[-1:] for row in self._active], last=True)
            numbers = [number(self._seed, row.sample, row.read) for row in self._active]
            seen = self._seen[:, :known]
            drawn, log_probabilities = chosen(logits, seen, self._sampling, numbers)
            self._seen.scatter_(1, drawn[:, None], True)
            new = []
            pairs = zip(drawn.tolist(), log_probabilities.tolist(), strict=True)
            for row, (token, log_probability) in zip(self._active, pairs, strict=True):
                if text := row.take(token, log_probability, end, self._tokens):
                    new.append((place[id(row)], text))
            on = [i for i, row in enumerate(self._active) if row.ended is None]
            if 0 < len(on) < len(self._active):
                self._stream, self._seen = self._stream.select(on), self._seen[on]
            self._active = [self._active[i] for i in on]
            yield new

    def leave(self) -> list[tuple[int, str]]:
        """End before the end; the rows that have more text then, with it: what was held back while
        a stop might have begun in it."""
        new = []
        for index, row in enumerate(self.rows):
            if row.ended is None:
                row.ended = "interrupted"
                rest = row.stops.rest()
                row.text += rest
                new += [(index, rest)] if rest else []
        self._active = []
        return new

    @property
    def results(self) -> list[Continuation]:
        """What has come, a row each."""
        self.leave()
        return [
            Continuation(
                row.prompt, row.prompt_tokens, row.sample, row.text, row.ids,
                row.log_probabilities, row.ended or "",
            )
            for row in self.rows
        ]  # fmt: skip

    @property
    def begun(self) -> Begun:
        """What the one row has come to, to go on from.

        Raises:
            UserError: there are several rows; `reading` is not over, or a token was interrupted.
        """
        if len(self.rows) > 1:
            raise UserError(f"{len(self.rows)} texts are no state to go on from; generate one")
        if not self._has_read or int(self._stream.lengths[0]) != self.rows[0].read - 1:
            raise UserError(
                "what the model has read and what was generated differ: reading() is not over, or "
                "a token was interrupted; read the prompt anew"
            )
        return Begun(self._stream, self.rows[0].recent, self._seen[0])

    def _encoded(self, prompt: Prompt) -> list[int]:
        tokenizer = self._model.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer.encode(prompt).tolist()
        else:
            ids = listed(prompt, tokenizer.vocabulary)
        return ids if ids or self._begun else [tokenizer.separator]


def _check(prompts: object, tokens: object, samples: object, seed: int, begun: object) -> None:
    """Raises UserError: they are none of `Generation`."""
    check_seed(seed)
    if not isinstance(prompts, Sequence):
        raise UserError(
            f"prompts of type {type(prompts).__name__}; give a text, or a list of texts and of "
            f"lists of ids (tolist() of a tensor makes these)"
        )
    whole = is_whole(tokens) and is_whole(samples)
    if not whole or tokens < 0 or samples < 1 or not prompts:  # type: ignore[operator]
        raise UserError(
            f"{len(prompts)} prompts, samples={samples}, tokens={tokens}; give at least one "
            f"prompt, and whole numbers: one sample or more, and 0 tokens or more"
        )
    if begun is not None and len(prompts) > 1:
        raise UserError(f"{len(prompts)} prompts go on from one state; give one")


def _last_document(ids: list[int], separator: int) -> list[int]:
    """From the last separator on, which begins a document."""
    return ids[max((i for i, token in enumerate(ids) if token == separator), default=0) :]


def generate(
    model: Speaker,
    prompts: str | Sequence[Prompt],
    tokens: int = TOKENS,
    samples: int = 1,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> list[Continuation]:
    """See `nlscale.generate.model.Model.generate`."""
    generation = Generation(model, prompts, tokens, samples, sampling, stop, seed)
    for _ in generation.reading():
        pass
    for _ in generation.writing():
        pass
    return generation.results

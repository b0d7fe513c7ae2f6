"""How likely a model holds continuations of contexts: what loglikelihood requests come down to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale.evaluate.finite import finite
from nlscale.generate.model import Model, Stream

Ids = tuple[int, ...]
_PIECE = 1024
"""Tokens of a row that are read at a time where only the last logits are of interest."""
_FORKS = 32
"""Continuations of a question at most: more of one context are further questions."""
_LOGITS = 1 << 25
"""The most logits of a piece of continuations, so that they fit wherever the model does."""


class Question(NamedTuple):
    """A context, read once, and all continuations that are asked of it."""

    context: Ids
    """At least one id."""
    continuations: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        """That are read for it."""
        return len(self.context) + sum(max(0, len(ids) - 1) for ids in self.continuations)


class Likelihood(NamedTuple):
    """Of one continuation."""

    log_probability: float
    """log p(continuation | context), in nats: the sum over its tokens."""
    greedy: bool
    """Whether each token is the most likely one."""


def questions(pairs: Sequence[tuple[Ids, Ids]]) -> list[Question]:
    """Contexts with what is asked of each, the longest first; equal requests are asked once.

    Args:
        pairs: of a context and a continuation.
    """
    asked: dict[Ids, dict[Ids, None]] = {}
    for context, continuation in pairs:
        asked.setdefault(context, {})[continuation] = None
    found = []
    for context, of in asked.items():
        longest_first = sorted(of, key=lambda ids: -len(ids))
        for first in range(0, len(of), _FORKS):
            found.append(Question(context, tuple(longest_first[first : first + _FORKS])))
    return sorted(found, key=lambda question: -question.tokens)


def likelihoods(
    model: Model, asked: Sequence[Question], rows: int, advance: Callable[[int], None]
) -> list[list[Likelihood]]:
    """Of each question and each of its continuations.

    The contexts are read side by side, each once; its state is forked for its continuations.

    Args:
        model: that is asked.
        asked: whose contexts are read at once, so of about the same length.
        rows: continuations that are read at once.
        advance: called with the number of tokens that have been read since the last call.
    """
    stream = model.stream(len(asked))
    after = _read(stream, [question.context for question in asked], advance)
    wanted = [(i, j) for i, of in enumerate(asked) for j in range(len(of.continuations))]
    wanted.sort(key=lambda place: -len(asked[place[0]].continuations[place[1]]))
    found: dict[tuple[int, int], Likelihood] = {}
    for first in range(0, len(wanted), rows):
        part = wanted[first : first + rows]
        chosen = [i for i, _ in part]
        continuations = [asked[i].continuations[j] for i, j in part]
        some = _continued(stream, chosen, after[chosen], continuations, advance)
        found.update(zip(part, some, strict=True))
    return [[found[i, j] for j in range(len(of.continuations))] for i, of in enumerate(asked)]


def _read(stream: Stream, contexts: Sequence[Ids], advance: Callable[[int], None]) -> Tensor:
    """Feeds them; logits [batch, vocabulary] after the last token of each."""
    after: Tensor | None = None
    for tokens, lengths in _pieces(contexts, _PIECE):
        logits = stream.feed(tokens, lengths, last=True)
        read = (lengths > 0).to(logits.device)[:, None]
        after = logits if after is None else torch.where(read, logits, after)
        advance(int(lengths.sum()))
    assert after is not None, "a context has at least one token"
    return after


def _continued(
    stream: Stream,
    rows: Sequence[int],
    after: Tensor,
    continuations: Sequence[Ids],
    advance: Callable[[int], None],
) -> list[Likelihood]:
    """Of a continuation a row, read by a fork of the stream.

    Args:
        stream: that has read the contexts; it stays where it is.
        rows: of it, that the continuations follow.
        after: logits [continuations, vocabulary] after the contexts.
        continuations: the longest first.
        advance: see `likelihoods`.

    Raises:
        UserError: a logit is not finite.
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    greedy = torch.ones(len(rows), dtype=torch.bool)

    def weigh(logits: Tensor, start: int) -> None:
        """Of logits [rows, n, vocabulary] that are of the tokens from `start` on."""
        nonlocal total, greedy
        targets, lengths = _padded(continuations, start, logits.shape[1])
        there = torch.arange(logits.shape[1]) < lengths[:, None]
        place = targets.to(logits.device)[..., None]
        each = logits.log_softmax(-1).gather(-1, place)[..., 0].cpu().double()
        likeliest = logits.argmax(-1).cpu()
        total = total + torch.where(there, each, 0.0).sum(-1)
        greedy = greedy & ((likeliest == targets) | ~there).all(-1)

    weigh(after[:, None], 0)
    fed = [ids[:-1] for ids in continuations]  # nothing is asked after the last token
    if any(fed):
        branch, start = stream.select(rows), 1
        piece = max(16, _LOGITS // (len(rows) * after.shape[-1]))
        for tokens, lengths in _pieces(fed, piece):
            weigh(branch.feed(tokens, lengths), start)
            start += tokens.shape[1]
            advance(int(lengths.sum()))
    pairs = zip(finite(total).tolist(), greedy.tolist(), strict=True)
    return [Likelihood(log_probability, is_greedy) for log_probability, is_greedy in pairs]


def _pieces(rows: Sequence[Ids], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows side by side, `size` tokens at a time: ids, and how many of them each row has."""
    longest = max(map(len, rows))
    for start in range(0, longest, size):
        yield _padded(rows, start, min(size, longest - start))


def _padded(rows: Sequence[Ids], start: int, size: int) -> tuple[Tensor, Tensor]:
    """Ids [rows, size] of the rows from `start` on, filled up with 0; lengths [rows]; int64."""
    parts = [row[start : start + size] for row in rows]
    padded = torch.zeros(len(rows), size, dtype=torch.int64)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = torch.tensor(part, dtype=torch.int64)
    return padded, torch.tensor([len(part) for part in parts])

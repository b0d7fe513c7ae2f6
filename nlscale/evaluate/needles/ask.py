"""Needles: prompts are made, answered greedily, and what is found in the answers is counted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nlscale.config.curriculum import largest
from nlscale.config.urls import Location
from nlscale.data.index import read_index
from nlscale.data.needles.haystack import text_of
from nlscale.data.needles.kinds import KINDS
from nlscale.data.needles.prompt import DEPTHS, Prompt, prompt, smallest
from nlscale.data.tasks.table import task_of_index
from nlscale.data.tasks.task import Task
from nlscale.data.tasks.text_needle import TextNeedle
from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Advance, Context, Part
from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.asking.tokenizer import tokenizer_of
from nlscale.evaluate.finite import finite
from nlscale.evaluate.instruments.score import score_all
from nlscale.evaluate.intervals import Share
from nlscale.evaluate.needles.options import only_factors, tokens
from nlscale.evaluate.trained import Result
from nlscale.generate.given import data_of
from nlscale.generate.model import Model

_ROWS = 16
"""Prompts that are read beside each other, which are a part of the work."""
_TOKENS = 1 << 18
"""The most of a part, so that the state of attention fits."""
_PIECE = 512
_MORE = 16
"""Tokens that may come in an answer beside those of the right one."""


@dataclass(frozen=True)
class _Asked:
    """What is asked of a model."""

    kinds: Sequence[str]
    form: str
    haystack: str
    """Empty: noise."""
    named: str
    """Where the haystack is from."""
    seed: int


def evaluate(model: Model, options: argparse.Namespace, context: Context) -> Result:
    """See `nlscale.evaluate.trained.Trained.made_by`.

    A model that was trained on a task of symbols, `task:needle`, is asked that one.

    Raises:
        UserError: the model has no tokenizer of text, there is no haystack, or it or a length is
            too short.
    """
    task = _task(model)
    if task is not None and task.family == context.name and not isinstance(task, TextNeedle):
        factors = only_factors(options.lengths)
        return {"symbols": True, **score_all(model, task, factors, options.samples, context)}
    tokenizer = tokenizer_of(model, options.tokenizer)
    trained = largest(model.config).sequence_length
    lengths = tokens(options.lengths, trained)
    asked = _asked(model, task, options, lengths[0], tokenizer)
    for kind in asked.kinds:  # before anything else is done: that all of it can be
        _prompt(asked, kind, lengths[0], 0, options.samples, tokenizer)
        _prompt(asked, kind, lengths[-1], 0, options.samples, tokenizer)
    parts = [
        Part(f"{kind}-{length}-{numbers[0]}", len(numbers) * length, (kind, length, numbers))
        for kind in asked.kinds
        for length in lengths
        for numbers in _batches(options.samples, length)
    ]

    def work(part: Part, advance: Advance) -> list[list[tuple[float, bool]]]:
        kind, length, numbers = part.of
        prompts = [_prompt(asked, kind, length, n, options.samples, tokenizer) for n in numbers]
        said = answers(model, prompts, tokenizer, advance)
        return [_hits(one, text) for one, text in zip(prompts, said, strict=True)]

    found = context.parts(parts, work)
    samples: dict[tuple[str, int], list[list[Any]]] = {}
    for part, rows in zip(parts, found, strict=True):
        samples.setdefault(part.of[:2], []).extend(rows)
    cells = [_cell(kind, length, rows, options.depths) for (kind, length), rows in samples.items()]
    return {
        "symbols": False,
        "form": asked.form,
        "haystack": asked.named,
        "samples": options.samples,
        "trained_length": trained,
        "trained_on": str(task) if task is not None else None,
        "kinds": list(asked.kinds),
        "lengths": lengths,
        "cells": cells,
        "figures": {f"{c['kind']}/{shown(c['length'])}": c["score"]["share"] for c in cells},
    }


def _batches(samples: int, length: int) -> list[range]:
    """The numbers of the samples of each part."""
    rows = max(1, min(_ROWS, _TOKENS // length))
    return [range(first, min(first + rows, samples)) for first in range(0, samples, rows)]


def _task(model: Model) -> Task | None:
    """The task that a model was trained on; None: text, or nobody knows."""
    folders = model.config.data.folders()
    if len(folders) > 1:  # a mixture, which is no task's alone
        return None
    try:
        return task_of_index(read_index(folders[0]), folders[0])
    except UserError:
        return None


def _asked(
    model: Model,
    task: Task | None,
    options: argparse.Namespace,
    shortest: int,
    tokenizer: Tokenizer,
) -> _Asked:
    """What options, and the training of the model where they do not say it, ask for."""
    own = task if isinstance(task, TextNeedle) else None
    kinds = options.kinds or (own.all_kinds if own else list(KINDS))
    form = options.form or (own.form if own else _form(kinds, shortest, tokenizer))
    source: Location | None = options.haystack
    if source is None and own is not None:
        source = next(iter(own.reads), None)
    if source is None and own is None and any(KINDS[kind].haystack == "text" for kind in kinds):
        source = data_of(model.config, "name text with --haystack, or ask --kinds without any")
    haystack = "" if source is None else text_of(source, "validation")
    named = "noise" if source is None else str(source)
    return _Asked(kinds, form, haystack, named, options.seed)


def _form(kinds: list[str], shortest: int, tokenizer: Tokenizer) -> str:
    """RULER's words, where the shortest length has room for them."""
    least = max(smallest(kind, "ruler", lambda text: len(tokenizer.encode(text))) for kind in kinds)
    return "ruler" if least <= shortest else "short"


def _prompt(
    asked: _Asked, kind: str, length: int, number: int, samples: int, tokenizer: Tokenizer
) -> Prompt:
    """Prompt `number` of a kind and length: a pure function of these and the seed."""
    rng = np.random.default_rng([asked.seed, list(KINDS).index(kind), length, number, 0x6E65])
    # Evenly over the points of depth, at random within each share.
    depth = int((number + rng.random()) / samples * DEPTHS) / (DEPTHS - 1)
    return prompt(
        kind, asked.form, rng, depth, length, lambda text: len(tokenizer.encode(text)),
        asked.haystack,
    )  # fmt: skip


def answers(
    model: Model, prompts: Sequence[Prompt], tokenizer: Tokenizer, advance: Advance
) -> list[str]:
    """What a model says to each, the most likely token at each step.

    An answer ends with the separator of documents: what comes after it is another text. It stops
    when all that can be found is found in all of them, or they have ended, or when all have said
    some tokens more than the longest answer has.
    """
    ids = [torch.from_numpy(tokenizer.encode(one.text).astype(np.int64)) for one in prompts]
    sizes = torch.tensor([len(row) for row in ids])
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    stream = model.stream(len(ids))
    logits = torch.empty(0)
    for first in range(0, tokens.shape[1], _PIECE):
        piece = tokens[:, first : first + _PIECE]
        lengths = (sizes - first).clamp(0, piece.shape[1])
        last = stream.feed(piece, lengths, last=True)
        reads = (lengths > 0).to(last.device)[:, None]
        logits = torch.where(reads, last, logits) if first else last
        advance(int(lengths.sum()))
    most = max(len(tokenizer.encode(one.answer)) for one in prompts) + _MORE
    said: list[list[int]] = [[] for _ in prompts]
    texts = ["" for _ in prompts]
    for number in range(most):
        chosen = finite(logits).argmax(-1).cpu()
        for row, token in zip(said, chosen.tolist(), strict=True):
            row.append(token)
        texts = [_text(row, tokenizer) for row in said]
        ended = [
            tokenizer.separator in row or _complete(one, text)
            for one, row, text in zip(prompts, said, texts, strict=True)
        ]
        if number + 1 == most or all(ended):
            break
        logits = stream.feed(chosen[:, None], last=True)
    return texts


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Of what a model says, up to its end; ids that the tokenizer lacks are no text."""
    end = ids.index(tokenizer.separator) if tokenizer.separator in ids else len(ids)
    return tokenizer.decode([i for i in ids[:end] if i < tokenizer.vocabulary])


def _hits(one: Prompt, text: str) -> list[tuple[float, bool]]:
    """Of each reference its depth, and whether it was said, in capitals or not."""
    said = text.lower()
    pairs = zip(one.depths, one.references, strict=True)
    return [(depth, reference.lower() in said) for depth, reference in pairs]


def _complete(one: Prompt, text: str) -> bool:
    """Whether nothing that is said after it can change its score."""
    return all(hit for _, hit in _hits(one, text))


def _cell(kind: str, length: int, rows: Sequence[Sequence[Any]], depths: int) -> Result:
    """Of a kind and length: the share of references found, each sample counting alike; by depth,
    each reference. Those of one sample go right together, at one depth, too."""
    shares = [sum(hit for _, hit in row) / len(row) for row in rows]
    by_depth: list[list[list[bool]]] = [[] for _ in range(depths)]
    for row in rows:
        here: dict[int, list[bool]] = {}
        for depth, hit in row:
            here.setdefault(min(depths - 1, int(depth * depths)), []).append(hit)
        for place, hits in here.items():
            by_depth[place].append(hits)
    return {
        "kind": kind,
        "length": length,
        "score": Share(sum(shares), len(shares)).described(),
        "depths": [
            {"from": i / depths, "to": (i + 1) / depths, **_share(groups).described()}
            for i, groups in enumerate(by_depth)
            if groups
        ],
    }


def _share(groups: Sequence[Sequence[bool]]) -> Share:
    """Of references, each group those of one sample."""
    return Share.of_groups([sum(hits) for hits in groups], [len(hits) for hits in groups])

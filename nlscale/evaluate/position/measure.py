"""Loss by position, read piece by piece: no more than one piece's logits are there at a time."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nlscale.config.curriculum import largest
from nlscale.config.in_context import described
from nlscale.config.vocabulary import ContextReset
from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Advance, Context, Part
from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.intervals import Ratio
from nlscale.evaluate.position.reader import Learning, Reader, Static
from nlscale.evaluate.position.text import Text, text_of
from nlscale.evaluate.trained import Result
from nlscale.generate.learned import levels_of
from nlscale.generate.model import Model

_ROWS = 4
"""Contexts that are read beside each other, which are a part of the work."""
_PIECE = 1024
_LOGITS = 1 << 24
"""The most of a piece."""
_FINEST = 16
"""Where the first range of the curve ends, in tokens; each of the others is half an octave."""


def evaluate(model: Model, options: argparse.Namespace, context: Context) -> Result:
    """See `nlscale.evaluate.trained.Trained.made_by`.

    A target is at position n if n tokens of its context were read before it; those of a range
    (a, b] are the ones with a < n <= b.

    Raises:
        UserError: the text cannot be read, or is shorter than a context.
    """
    text = text_of(model, options.data, options.text, options.tokenizer)
    ends: list[int] = options.lengths
    contexts = contexts_of(text, ends, options.contexts)
    fine = _curve(ends)
    levels = levels_of(model, options.context, options.learned)
    if any(each.keys.reset == ContextReset.never for each in levels):
        parts = [_in_turn(contexts)]
    else:
        parts = [
            Part(f"{length}-{i}", len(some) * length, [(some, length)])
            for length, starts in contexts.items()
            for i in range(0, len(starts), _ROWS)
            if (some := starts[i : i + _ROWS])
        ]

    def work(part: Part, advance: Advance) -> list[list[list[float]]]:
        rows = len(part.of[0][0])
        reader = (
            Learning(model, rows, options.context, options.learned)
            if levels
            else Static(model, rows)
        )
        found: list[list[list[float]]] = []
        for starts, length in part.of:
            ends = [end for end in fine if end <= length]
            found += _read(model, text, starts, ends, advance, reader)
        reader.end()
        return found

    found = context.parts(parts, work)

    def figures(low: int, high: int) -> Result:
        """Of a range, over the contexts that are long enough for it."""
        first, last = fine.index(low) + 1 if low else 0, fine.index(high) + 1
        sums = [row[first:last] for rows in found for row in rows if len(row) >= last]
        return _figures(np.array(sums).sum(1), low, high)

    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    positions = [figures(low, high) for low, high in ranges]
    whole = figures(0, ends[-1])
    return {
        "text": text.label,
        "tokens": text.tokens,
        "contexts": {str(length): len(starts) for length, starts in contexts.items()},
        "trained_length": largest(model.config).sequence_length,
        "document_mask": model.config.data.document_mask,
        "context": [described(each, model.config) for each in levels],
        "positions": positions,
        "all": whole,
        "curve": [figures(low, high) for low, high in zip([0, *fine[:-1]], fine, strict=True)],
        "figures": _by_name([*positions, whole]),
    }


def contexts_of(text: Text, ends: Sequence[int], most: int) -> dict[int, list[int]]:
    """Where contexts of each length begin, the longest first.

    Of the longest as many as there is text for, `most` if that is more; then of each shorter one so
    many more as there are too few longer ones, which are read for it, too. Of two that begin in
    different places no range has a target in common, so that they are samples of their own.

    Raises:
        UserError: there is no text for one of the longest.
    """
    room = (text.tokens - 1) // ends[-1]
    if room < 1:
        raise UserError(
            f"{text.label} is {text.tokens:,} tokens, and a context of {shown(ends[-1])} needs "
            f"{ends[-1] + 1:,}; give shorter --lengths, or more text with --data or --text"
        )
    found: dict[int, list[int]] = {}
    taken: list[int] = []
    for end in reversed(ends):
        free = [
            start
            for start in range(0, text.tokens - end, end)
            if all(abs(start - other) >= end for other in taken)
        ]
        count = min(most - len(taken), len(free))
        found[end] = [free[i * len(free) // count] for i in range(count)]
        taken += found[end]
    return {end: starts for end, starts in found.items() if starts}


def _curve(ends: Sequence[int]) -> list[int]:
    """Ends of ranges half an octave wide, those that were asked for among them."""
    octaves = math.log2(ends[-1] / _FINEST)
    between = (round(_FINEST * 2 ** (i / 2)) for i in range(math.ceil(max(0, 2 * octaves))))
    return sorted({*ends, *(end for end in between if end < ends[-1])})


def _in_turn(contexts: dict[int, list[int]]) -> Part:
    """All contexts as one part, a row at a time, in the order of the text."""
    each = sorted((start, length) for length, starts in contexts.items() for start in starts)
    size = sum(length for _, length in each)
    return Part("in-turn", size, [([start], length) for start, length in each])


def _read(
    model: Model,
    text: Text,
    starts: Sequence[int],
    ends: Sequence[int],
    advance: Advance,
    reader: Reader,
) -> list[list[list[float]]]:
    """Nats, targets that count and bytes of text, [contexts, ranges, 3]."""
    length, rows = ends[-1], len(starts)
    ids = torch.from_numpy(np.stack([text.read(start, length + 1) for start in starts]))
    places = torch.arange(1, length + 1)
    range_of = torch.bucketize(places, torch.tensor(ends))
    counted = torch.ones(rows, length, dtype=torch.float64)
    for row, start in enumerate(starts):
        mask = text.read_mask(start + 1, length)
        if mask is not None:
            counted[row] = torch.from_numpy(mask)
    size = torch.from_numpy(text.bytes)[ids[:, 1:]].double() * counted
    sums = torch.zeros(rows, len(ends), 3, dtype=torch.float64)
    reader.begin()
    step = max(1, min(_PIECE, _LOGITS // (rows * model.vocabulary)))
    for first in range(0, length, step):
        here = slice(first, min(first + step, length))
        nats = reader.nats(ids[:, here], ids[:, 1:][:, here]) * counted[:, here]
        for kind, values in enumerate((nats, counted[:, here], size[:, here])):
            sums[:, :, kind].index_add_(1, range_of[here], values)
        advance(rows * (here.stop - here.start))
    return sums.tolist()


def _figures(sums: np.ndarray, low: int, high: int) -> Result:
    """Of one range; `sums` is [contexts, 3]. A context of which no target counts is left out."""
    sums = sums[sums[:, 1] > 0]
    nats, counted, size = (sums[:, kind].tolist() for kind in range(3))
    loss = Ratio.of(nats, counted)
    bits = Ratio.of([n / math.log(2) for n in nats], size)
    return {
        "from": low,
        "to": high,
        "contexts": len(sums),
        "targets": int(sum(counted)),
        "loss": loss and loss.described(),
        "perplexity": loss and _perplexity(loss),
        "bits_per_byte": bits and bits.described(),
    }


def _perplexity(loss: Ratio) -> dict[str, Any]:
    interval = loss.interval and [math.exp(end) for end in loss.interval]
    return {"value": math.exp(loss.value), "interval": interval, "samples": loss.samples}


def _by_name(ranges: Sequence[Result]) -> dict[str, float]:
    return {
        f"{shown(one['from']) if one['from'] else 0}-{shown(one['to'])}/{name}": one[name]["value"]
        for one in ranges
        for name in ("loss", "perplexity", "bits_per_byte")
        if one[name] is not None
    }

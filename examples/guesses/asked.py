"""Asks a model what follows, on held-out text of its own data."""

from __future__ import annotations

import argparse

import torch

from nlscale.data import TokenShards
from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Advance, Context, Part
from nlscale.evaluate.finite import finite
from nlscale.evaluate.intervals import Share
from nlscale.evaluate.trained import Result
from nlscale.generate.given import data_of
from nlscale.generate.model import Model


def evaluate(model: Model, options: argparse.Namespace, context: Context) -> Result:
    """The share of tokens that the model guesses, each context a part of the work.

    Raises:
        UserError: the data of the run are not there, or hold no context.
    """
    folder = data_of(model.config, "ask a model that was trained on one folder")
    shards = TokenShards(folder, "validation")
    length = model.config.data.sequence_length
    count = min(options.contexts, (shards.tokens - 1) // length)
    if count < 1:
        raise UserError(f"{folder} holds {shards.tokens:,} tokens out; give more")
    parts = [Part(f"{number}", length, number * length) for number in range(count)]

    def work(part: Part, advance: Advance) -> int:
        ids = torch.from_numpy(shards.read(part.of, length + 1))[None]
        guessed = finite(model.logits(ids[:, :-1])).argmax(-1).cpu()
        advance(length)
        return int((guessed == ids[:, 1:]).sum())

    right = context.parts(parts, work)
    guessed = Share.of_groups(right, [length] * count)
    return {"guessed": guessed.described(), "figures": {"guessed": guessed.share}}

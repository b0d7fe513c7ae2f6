"""The score of a trained model on the task that it was trained on, and on longer ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nlscale.data.tasks.examples import Split, example
from nlscale.data.tasks.task import Task
from nlscale.errors import UserError
from nlscale.evaluate.finite import finite
from nlscale.evaluate.intervals import Share
from nlscale.generate.model import Model

__all__ = ["Score", "Share", "score"]

_LOGITS = 1 << 24
"""The most that a batch has, so that they fit wherever the model does."""


@dataclass(frozen=True)
class Score:
    """What a model got right of a task."""

    factor: int
    """The length of its examples against those of training."""
    task: Task
    targets: Share
    """Of the targets that count, those that were the most likely token."""
    examples: Share
    """Of the examples, those without a mistake."""


def score(
    model: Model,
    task: Task,
    factor: int,
    examples: int,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Score:
    """Of fresh examples, none of which can have been trained on.

    Args:
        model: trained on data of `task`.
        task: as it was trained on.
        factor: 1, or how many times longer its examples are to be.
        examples: how many of them.
        advance: called with how many more of their tokens are read.

    Raises:
        UserError: the model knows fewer tokens than the task has, or there is no such length.
    """
    if len(task.symbols) > model.vocabulary:
        raise UserError(
            f"task {task} has {len(task.symbols)} symbols, and the model knows "
            f"{model.vocabulary}; name the data that it was trained on"
        )
    task = task if factor == 1 else task.longer(factor)
    rows = max(1, min(64, _LOGITS // (task.length * model.vocabulary)))
    right: list[int] = []
    counted: list[int] = []
    for first in range(0, examples, rows):
        numbers = range(first, min(first + rows, examples))
        drawn = [example(task, Split.fresh, 0, number) for number in numbers]
        ids = torch.from_numpy(np.stack([one.ids for one in drawn]))
        counts = torch.from_numpy(np.stack([one.mask for one in drawn]))[:, 1:]
        said = finite(model.logits(ids[:, :-1])).argmax(-1).cpu()
        wrong = counts & (said != ids[:, 1:])
        counted += counts.sum(1).tolist()
        right += (counts.sum(1) - wrong.sum(1)).tolist()
        advance(len(drawn) * task.length)
    whole = sum(r == n for r, n in zip(right, counted, strict=True))
    return Score(factor, task, Share.of_groups(right, counted), Share(whole, examples))

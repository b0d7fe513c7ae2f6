"""The score of a trained model on the task that it was trained on, and on longer ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nlscale.data.tasks.examples import Split, example
from nlscale.data.tasks.task import Task
from nlscale.errors import UserError
from nlscale.generate.model import Model

_LOGITS = 1 << 24
"""The most that a batch has, so that they fit wherever the model does."""
_Z = 1.959963984540054
"""Of an interval that holds 95%."""


@dataclass(frozen=True)
class Share:
    """How many of how many, and the 95% interval of Wilson of the share."""

    right: int
    of: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        n, p = self.of, self.share
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        # Exactly, where rounding would leave a little.
        return middle - half if self.right else 0.0, middle + half if self.right < n else 1.0

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share, "interval": list(self.interval)}


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


def score(model: Model, task: Task, factor: int, examples: int) -> Score:
    """Of fresh examples, none of which can have been trained on.

    Args:
        model: trained on data of `task`.
        task: as it was trained on.
        factor: 1, or how many times longer its examples are to be.
        examples: how many of them.

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
    right = of = whole = 0
    for first in range(0, examples, rows):
        numbers = range(first, min(first + rows, examples))
        drawn = [example(task, Split.fresh, 0, number) for number in numbers]
        ids = torch.from_numpy(np.stack([one.ids for one in drawn]))
        counts = torch.from_numpy(np.stack([one.mask for one in drawn]))[:, 1:]
        said = model.logits(ids[:, :-1]).argmax(-1).cpu()
        wrong = counts & (said != ids[:, 1:])
        of += int(counts.sum())
        right += int(counts.sum() - wrong.sum())
        whole += int((~wrong.any(1)).sum())
    return Score(factor, task, Share(right, of), Share(whole, examples))

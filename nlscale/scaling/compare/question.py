"""What is asked of runs, by the command line or at the end of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SEED = "run.seed"
VAL_LOSS = "val_loss"
"""The metric that is a mean over the last validations."""
FINALIST = "finalist"
"""Stands for a key: the place, from 1, that the search of its sweep gave a run's setting."""


@dataclass(frozen=True)
class Question:
    """Keys and options of `nlscale compare`, which says what each means."""

    by: Sequence[str]
    paired_by: Sequence[str] = (SEED,)
    metric: str = VAL_LOSS
    baselines: Mapping[str, str] = field(default_factory=dict)
    each: Sequence[str] = ()
    """Keys: the runs of each combination of their values are a table of their own."""
    only: Mapping[str, str] = field(default_factory=dict)
    effect: float | None = None
    level: float = 0.95

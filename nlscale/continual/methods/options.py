"""What the methods and their hooks can be told. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nlscale.config.fields import one_of, path, within
from nlscale.continual.metrics import METRICS

_MOST = 1e12


@dataclass
class EwcOptions:
    """Of `ewc`."""

    strength: float = within(1.0, least=0, most=_MOST)
    """lambda: the loss has strength * sum of F (theta - theta*)^2 added, nats a token."""
    sequences: int = within(64, above=0, most=1_000_000)
    """Of the end of a task, from which F is estimated."""


@dataclass
class LwfOptions:
    """Of `lwf`."""

    strength: float = within(1.0, least=0, most=_MOST)
    """lambda: each target has strength * tau^2 * KL(old || new) added to its loss, nats."""
    temperature: float = within(2.0, above=0, most=1000)
    """tau, by which the logits of both are divided."""


@dataclass
class FreezeOptions:
    """Of `freeze`."""

    levels: list[str] = field(default_factory=list)
    """Names of levels that stand still once it has been called."""


@dataclass
class LearnOptions:
    """Of `learn-in-context`."""

    sequences: int = within(64, above=0, most=1_000_000)
    """The last of the training samples, which levels that are never reset read at each call."""


@dataclass
class SourceOptions:
    """A data folder of a task."""

    dir: str = path(url=True)
    """As the run's mixtures name it."""
    weight: float = within(1.0, above=0)
    """Its share of the task's score."""


@dataclass
class TaskOptions:
    """A task whose score is taken."""

    name: str = MISSING
    """In metrics."""
    sources: list[SourceOptions] = field(default_factory=list)
    """Whose held-out sequences it is scored on."""


@dataclass
class ScoresOptions:
    """Of `task-scores`."""

    tasks: list[TaskOptions] = field(default_factory=list)
    """All of the stream."""
    metric: str = one_of(list(METRICS))
    """What is measured."""

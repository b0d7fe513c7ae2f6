"""What the hooks that come with nlscale can be told. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from nlscale.config.fields import within

MOST_SAMPLES = 10_000_000
"""That a buffer holds: their numbers are in every checkpoint."""


@dataclass
class NoOptions:
    """Of a hook that takes none."""


@dataclass
class EvaluateOptions:
    """Of `evaluate`."""

    names: list[str] = field(default_factory=lambda: ["loss"])
    """Evaluations, as the key `evaluate` takes them."""


@dataclass
class AverageOptions:
    """Of `average`."""

    decay: float = within(0.9, least=0, below=1)
    """Share of the average before that stays at an update."""


@dataclass
class ReplayOptions:
    """Of `replay`."""

    size: int = within(1024, above=0, most=MOST_SAMPLES)
    """Samples in the buffer."""
    share: float = within(0.25, least=0, most=1)
    """Of a step's samples that are read from it, on the average."""

"""The keys of `levels.period_warmup`: periods that grow at first, and may fall again.

`nlscale.config.periods` makes periods of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nlscale.config.fields import within


@dataclass
class CriticalBatch:
    """The critical batch from some step on, until the next entry or the end of the run."""

    from_: str = MISSING
    """When it holds: a share of train.steps such as '10%', or '1000 steps' that come before it; the
    first entry at 0."""
    tokens: str = MISSING
    """As you state it, such as '500k tokens': nothing is measured for it in the run."""


@dataclass
class PeriodWarmupConfig:
    """Periods that grow 1, 2, 4, ... to those of the spectrum, and may fall again at the end. None
    by default; where several of these say how long a period may be, the shortest holds."""

    steps: str | None = None
    """In which they grow to the longest of the spectrum, each for an equal part: a share of
    train.steps such as '10%', or '1000 steps'; null: they do not grow by steps."""
    critical_batch: list[CriticalBatch] = field(default_factory=list)
    """Critical batch, of which the tokens of a period stay below a share: [{from: 0%, tokens: 100k
    tokens}, {from: 10%, tokens: 1M tokens}]; none: no bound."""
    share: float = within(0.25, above=0)
    """Of the critical batch, which the tokens of a period are not to exceed."""
    cooldown: str | None = None
    """When they begin to fall, to half each for an equal part of the rest, with 1 at the end: a
    share of train.steps such as '80%', or '1000 steps' that come before; null: they do not."""

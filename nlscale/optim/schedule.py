"""The learning rate as a function of the step; a level samples it when it updates."""

from __future__ import annotations

import math

from nlscale.config.vocabulary import OptimizerConfig, Schedule


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at a step counted from 1, in a run of that many steps.

    Linear warm-up, then a cosine to `min_learning_rate` of the peak, or (wsd) the peak until the
    last `decay_fraction` of the run and a linear decay over it.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.min_learning_rate
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == Schedule.cosine:
        progress = (step - warmup) / max(1, steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    left = min(1.0, (steps - step) / _decay_steps(config, steps))
    return floor + (peak - floor) * left


def stable_steps(config: OptimizerConfig, steps: int) -> int:
    """The first steps of a run of that many whose learning rate is that of any longer run.

    They end where wsd begins to decay; 0 where every step depends on the length of the run.
    """
    if config.schedule != Schedule.wsd or steps < config.warmup_steps:
        return 0
    return max(0, steps - _decay_steps(config, steps))


def update_warmup(config: OptimizerConfig, updates: int) -> float:
    """Factor on the learning rate of a group that has made that many updates."""
    return min(1.0, (updates + 1) / (config.warmup_updates + 1))


def _decay_steps(config: OptimizerConfig, steps: int) -> int:
    return max(1, round(config.decay_fraction * steps))

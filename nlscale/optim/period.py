"""Memories of gradients that last as many tokens at every period (docs/concepts/optimizers.md).

A level of period C sees one averaged gradient where another sees C. Of `optimizer.betas_by_period`
alone: the default leaves the numbers per update as they are. No torch is imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nlscale.config.optimizer import OptimizerConfig


def at_period(config: OptimizerConfig, period: int) -> OptimizerConfig:
    """With memories of gradients that last as many tokens as at a period of one step.

    beta -> beta^C (docs/concepts/optimizers.md); of `optimizer.betas_by_period` alone.
    """
    if not config.betas_by_period:
        return config
    return replace(
        config,
        beta1=config.beta1**period,
        beta2=config.beta2**period,
        muon=replace(config.muon, momentum=config.muon.momentum**period),
        delta=replace(config.delta, momentum=config.delta.momentum**period),
        deep=replace(config.deep, momentum=config.deep.momentum**period),
        m3=replace(
            config.m3,
            momentum=config.m3.momentum**period,
            second_moment=config.m3.second_moment**period,
        ),
        sgd=replace(config.sgd, momentum=config.sgd.momentum**period),
    )


def decay_at(config: OptimizerConfig, decay: float, rate: float, period: int) -> float:
    """The weight decay of an update at a rate, for as much decay a step as at period 1.

    (1 - rate decay_C) = (1 - rate decay)^C; of `optimizer.betas_by_period` alone.
    """
    if not config.betas_by_period or rate == 0:
        return decay
    return (1 - (1 - rate * decay) ** period) / rate


def set_memories(optimizer: Any, config: OptimizerConfig, made: float) -> None:
    """Give an optimizer the numbers of an update at another period than the one before.

    Bias correction is 1 - the product of the betas so far, whatever they were: a rule's step count
    is set to the updates of this period that have the same product.

    Args:
        optimizer: that a rule has made (`nlscale.optim.table.Rule`).
        config: its section, `at_period`.
        made: updates of that period for which the memories have decayed.
    """
    optimizer.config = config
    for group in optimizer.param_groups:
        group["betas"] = (config.beta1, config.beta2)
    for state in optimizer.state.values():
        state["step"].fill_(made)

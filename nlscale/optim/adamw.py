"""AdamW, with the width and the kind of each parameter taken into account."""

from __future__ import annotations

from typing import Any

import torch

from nlscale.config.vocabulary import OptimizerConfig


def adamw(
    config: OptimizerConfig, width_multiplier: float, parameters: list[Any]
) -> torch.optim.AdamW:
    """AdamW over some parameters; eps follows the gradients, 1/m of what they were at width m.

    Args:
        config: its numbers.
        width_multiplier: of the model (`nlscale.model.width`), by which eps is divided.
        parameters: tagged (`nlscale.model.init.tag`).
    """
    return torch.optim.AdamW(
        parameter_groups(config, parameters),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps / width_multiplier,
        fused=True,
    )


def parameter_groups(config: OptimizerConfig, parameters: list[Any]) -> list[dict[str, Any]]:
    """Parameters by how they are decayed and scaled, as torch's optimizers take them.

    Weight decay on matrices; vectors (norms, biases, mixing weights) and gains have none, as their
    tags say. What has a width multiplier m learns at 1/m of its level's rate, with m times the
    weight decay, because that is multiplied by the rate (`nlscale.model.width`).
    """
    kinds: dict[tuple[bool, float], list[Any]] = {}
    for p in parameters:
        kinds.setdefault((p.decays, p.width_multiplier), []).append(p)
    groups = []
    for decays, multiplier in sorted(kinds, key=lambda kind: (not kind[0], kind[1])):
        decay = config.weight_decay * multiplier if decays else 0.0
        groups.append(
            {
                "params": kinds[decays, multiplier],
                "weight_decay": decay,
                "wd_mult": float(decay > 0),
                "lr_mult": 1.0 / multiplier,
            }
        )
    return groups

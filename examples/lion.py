"""An optimizer rule of one's own (`examples.additions` adds it as `optimizer.rule=lion`).

Lion (Chen et al. 2023, arXiv 2302.06675), on whatever range of each parameter a rank holds:

    p <- p - lr (sign(b1 m + (1 - b1) g) + decay p)        m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlscale.config.vocabulary import OptimizerConfig
from nlscale.optim.adamw import parameter_groups


class Lion(torch.optim.AdamW):
    """megatron-core's DistributedOptimizer takes Adam and what derives from it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, but nothing where `found_inf` is set."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["momentum"] = torch.zeros_like(p)
                taken = 1.0 if found_inf is None else 1.0 - found_inf.to(p.device)
                update = state["momentum"].lerp(p.grad, 1 - beta1).sign_()
                p.sub_(taken * group["lr"] * (update + group["weight_decay"] * p))
                state["momentum"].lerp_(p.grad, taken * (1 - beta2))
                state["step"] += taken


def lion(config: OptimizerConfig, width_multiplier: float, parameters: list[Any]) -> Lion:
    """Grouped as AdamW's: decay on matrices, rates and decay scaled by width."""
    groups = parameter_groups(config, parameters)
    return Lion(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))

"""Plain gradient descent, with momentum if asked: M <- b M + G,  W <- W - lr (M + decay W)."""

from __future__ import annotations

from typing import Any

import torch

from nlscale.config.vocabulary import OptimizerConfig
from nlscale.optim.adamw import parameter_groups


class Sgd(torch.optim.AdamW):
    """megatron-core's DistributedOptimizer takes Adam and what derives from it."""

    config: OptimizerConfig
    """Its numbers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, but nothing where `found_inf` is set."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["momentum"] = torch.zeros_like(p)
                if found_inf is None:
                    found_inf = torch.zeros((), device=p.device)
                taken = 1.0 - found_inf
                gradient = p.grad.masked_fill(found_inf > 0, 0.0)  # 0 * NaN is NaN
                forgets = taken * (1 - self.config.sgd.momentum)
                momentum = state["momentum"].mul_(1 - forgets).add_(gradient)
                p.sub_((momentum + group["weight_decay"] * p) * (taken * group["lr"]))
                state["step"] += taken


def sgd(config: OptimizerConfig, width_multiplier: float, parameters: list[Any]) -> Sgd:
    """Grouped as AdamW's, at the rates of its table for width, which are not those of muP for SGD.

    Args:
        config: its numbers.
        width_multiplier: of the model; nothing here depends on it.
        parameters: tagged (`nlscale.model.init.tag`).
    """
    found = Sgd(parameter_groups(config, parameters), lr=config.learning_rate)
    found.config = config
    return found

"""Elastic weight consolidation: what mattered for earlier tasks is held where it was.

Kirkpatrick et al. 2017, with all earlier tasks kept:

    L + lambda sum_k sum_i F_ki (theta_i - theta*_ki)^2

F_k is the mean over sequences of the squared gradient of their log-likelihood at theta*_k, the
weights at the end of task k (`nlscale.step.squares`). The penalties of several tasks are one of
the same gradient, 2 lambda A (theta - c), with A = sum_k F_k and c = sum_k F_k theta*_k / A: two
numbers a parameter, however many tasks there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlscale.config.vocabulary import Tier
from nlscale.continual.methods.options import EwcOptions
from nlscale.errors import UserError
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.step.squares import mean_squares
from nlscale.train.hooks.hook import Hook

PRECISION, CENTRE = "ewc_precision", "ewc_centre"
"""Kinds of tensors in checkpoints: A and c."""


class Ewc(Hook):
    """Adds the penalty to every update; consolidates when it is called, such as at boundaries."""

    Options = EwcOptions
    one_length = True

    def begin(self) -> None:
        for level in self.run.config.levels.spectrum:
            if level.memory != Tier.hbm:
                raise UserError(
                    f"ewc adds to gradients that lie beside the weights, and the state of level "
                    f"{level.name!r} lies elsewhere (memory: {level.memory.value}); use memory: hbm"
                )
        self.run.trainer.optimizer.added.terms.append(self._pull)

    def on_update(self) -> None:
        """Take F of the last sequences, and where the weights are, into A and c."""
        trainer = self.run.trainer
        found = mean_squares(trainer, self.run.last_sequences(self.options.sequences))
        if PRECISION not in trainer.kept:
            for kind in (PRECISION, CENTRE):
                trainer.kept[kind] = {weights: torch.zeros_like(weights) for weights in found}
        for weights, fisher in found.items():
            consolidate(
                trainer.kept[PRECISION][weights],
                trainer.kept[CENTRE][weights],
                fisher,
                weights.detach(),
            )

    def _pull(self, group: GroupOptimizer, count: Tensor) -> None:
        kept = self.run.trainer.kept
        if PRECISION not in kept:
            return
        for weights in main_parameters(group):
            precision, centre = kept[PRECISION][weights], kept[CENTRE][weights]
            each = penalty_gradient(self.options.strength, precision, centre, weights.detach())
            weights.grad.add_(each * count.to(each.dtype))


def consolidate(precision: Tensor, centre: Tensor, fisher: Tensor, weights: Tensor) -> None:
    """Add a task: A <- A + F, and c towards the weights by F / A; where A is 0, c means nothing."""
    precision += fisher
    share = torch.where(precision > 0, fisher / precision, 0.0)
    centre += share * (weights - centre)


def penalty_gradient(strength: float, precision: Tensor, centre: Tensor, weights: Tensor) -> Tensor:
    """2 lambda A (theta - c)."""
    return 2 * strength * precision * (weights - centre)

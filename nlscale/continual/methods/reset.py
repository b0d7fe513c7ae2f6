"""Optimizers that begin anew with each task."""

from __future__ import annotations

from nlscale.levels.anew import begin_optimizers
from nlscale.train.hooks.hook import Hook


class ResetOptimizer(Hook):
    """Forgets moments when it is called; weights and windows stay."""

    def on_update(self) -> None:
        begin_optimizers(self.run.trainer.optimizer)

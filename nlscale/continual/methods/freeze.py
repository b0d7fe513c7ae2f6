"""Levels that stand still after the first task: they keep what they have learned."""

from __future__ import annotations

from nlscale.continual.methods.options import FreezeOptions
from nlscale.errors import UserError
from nlscale.train.hooks.hook import Hook, chosen


class Freeze(Hook):
    """Gives levels a learning rate of 0 from the first of its `steps` on."""

    Options = FreezeOptions

    def begin(self) -> None:
        names = [level.name for level in self.run.trainer.levels]
        try:
            self._levels = set(chosen(self.options.levels, names))
        except ValueError as error:
            raise UserError(f"freeze: levels: {error}") from None
        if self.noted.get("frozen"):
            self._freeze()

    def on_update(self) -> None:
        self._freeze()

    def _freeze(self) -> None:
        self.noted["frozen"] = True
        self.run.trainer.optimizer.added.frozen |= self._levels

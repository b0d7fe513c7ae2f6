"""Calling the hooks of a run."""

from __future__ import annotations

from collections.abc import Container

from nlscale.cluster.life.watch import doing
from nlscale.train.hooks.hook import Hook, Running
from nlscale.train.hooks.table import known


class Hooks:
    """Those of a run, in the order of `hooks`.

    Args:
        run: built, and restored where it goes on.
    """

    def __init__(self, run: Running) -> None:
        self._run, optimizer = run, run.trainer.optimizer
        names = [level.name for level in run.trainer.levels]
        self._updates = [optimizer.counts(level)[0] for level in range(len(names))]
        self._hooks: list[tuple[Hook, int | None]] = []
        for index, given in enumerate(run.config.hooks):
            one = known(given.name)
            hook = one.load()(run, given, one.read(given, f"hooks.{index}"))
            self._hooks.append((hook, None if given.level is None else names.index(given.level)))

    def begin(self) -> None:
        """Before the first step of a start."""
        for hook, _ in self._hooks:
            with doing(f"hook {hook.given.name}"):
                hook.begin()

    def after_step(self, updated: Container[int]) -> None:
        """After a step; `updated`: the levels of which a part has made an update.

        A level has begun an update when that of its sync groups that has made most makes one more.
        """
        begun = set()
        for level, before in enumerate(self._updates):
            if level in updated:
                self._updates[level] = self._run.trainer.optimizer.counts(level)[0]
                if self._updates[level] > before:
                    begun.add(level)
        for hook, own in self._hooks:
            if own in begun or self._run.step in hook.given.steps:
                with doing(f"hook {hook.given.name}"):
                    hook.on_update()
        if self._hooks:
            self._run.trainer.clock.free()

"""Hooks: what is called in the course of a run, on the cadence of a level. No torch is imported.

    from nlscale.train.hooks import Hook, register

    class Mine(Hook):
        def on_update(self) -> None: ...

    register("mine", Mine)

docs/how-to/hook-into-a-run.md has an example.
"""

from nlscale.train.hooks.hook import Hook, Running
from nlscale.train.hooks.table import register

__all__ = ["Hook", "Running", "register"]

"""The built-in hook `evaluate`: evaluations on the cadence of a level."""

from __future__ import annotations

import time

from nlscale.evaluate.table import check, evaluation
from nlscale.train.hooks.hook import Hook
from nlscale.train.hooks.options import EvaluateOptions
from nlscale.train.validation import by_source


class Evaluate(Hook):
    """Asks what the key `evaluate` asks at validations; in metrics.jsonl as NAME@LEVEL."""

    Options = EvaluateOptions

    def begin(self) -> None:
        check(self.options.names)

    def on_update(self) -> None:
        """Ask, and record what was found."""
        run = self.run
        for name in self.options.names:
            started, asked = time.monotonic(), evaluation(name)
            held_out = run.prepared.validation
            found = [asked.run(run.trainer, each.samples) for each in held_out]
            figures = found[0] if len(held_out) == 1 else by_source(found, held_out)
            at = self.given.level or "steps"
            run.record(f"{name}@{at}", figures, time.monotonic() - started)

"""The built-in hook `average`: a moving average of the weights, and its validation loss."""

from __future__ import annotations

import time

import torch

from nlscale.step.swap import stand_in
from nlscale.train.hooks.hook import Hook
from nlscale.train.hooks.options import AverageOptions
from nlscale.train.validation import validated

KIND = "average"
"""Of its tensors in checkpoints."""


class Average(Hook):
    """average <- decay average + (1 - decay) weights, fp32, at each call; it begins with the first.

    The held-out loss of the averaged weights is recorded as the evaluation `average`.
    """

    Options = AverageOptions

    def on_update(self) -> None:
        """Take the weights in, and see how good the average is."""
        run, started = self.run, time.monotonic()
        weights = [shard.weights for shard in run.trainer.shards()]
        kept = run.trainer.kept.get(KIND)
        if kept is None:
            run.trainer.kept[KIND] = {w: w.detach().clone() for w in weights}
        else:
            with torch.no_grad():
                for w in weights:
                    kept[w].lerp_(w.detach(), 1 - self.options.decay)
        with stand_in(run.trainer, KIND):
            from nlscale.evaluate.loss import loss

            held_out = run.prepared.validation
            figures = [loss(run.trainer, each.samples) for each in held_out]
        found = figures[0] if len(held_out) == 1 else validated(figures, held_out)
        whole = {key: found[key] for key in ("loss", "bits_per_byte")}
        run.record(KIND, whole, time.monotonic() - started)

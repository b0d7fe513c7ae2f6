"""The built-in hook `replay`: a buffer of samples, refreshed on the cadence of a level."""

from __future__ import annotations

from nlscale.train.hooks.hook import Hook
from nlscale.train.hooks.options import ReplayOptions
from nlscale.train.replay import reservoir


class Refresh(Hook):
    """Reads samples of all that came before again: a uniform choice, made anew at each call."""

    Options = ReplayOptions
    one_length = True

    def on_update(self) -> None:
        """Let the samples since the last call take their places."""
        run, options = self.run, self.options
        new = range(self.noted.get("samples", 0), run.samples)
        seed = run.config.run.seed
        run.replay.fill(reservoir(run.replay.numbers, new, options.size, seed), options.share)
        self.noted["samples"] = run.samples

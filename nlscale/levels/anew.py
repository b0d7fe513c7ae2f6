"""Optimizers that begin anew in the course of a run."""

from __future__ import annotations

from nlscale.levels.engine import LevelOptimizer


def begin_optimizers(optimizer: LevelOptimizer) -> None:
    """Forget what the rules keep of gradients, as if none had been seen; weights, copies of
    them, windows and what outer steps keep stay. Bias corrections begin anew as well."""
    for group in optimizer.groups:
        group.optimizer.optimizer.state.clear()
    for progress in optimizer.progress.values():
        progress.begin_state()

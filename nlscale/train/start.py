"""From a recipe to a run under way."""

from __future__ import annotations

from pathlib import Path

from nlscale.cluster.life.signals import StopSignals
from nlscale.config import recipe
from nlscale.train.prepare import prepare


def start(path: str | Path, overrides: list[str]) -> int:
    """Train a recipe, in this process or, under torchrun, as one of its ranks.

    Returns:
        The exit code of a run that has finished.

    Raises:
        UserError: as `nlscale.train.prepare.prepare` and `nlscale.train.loop.train`.
    """
    with StopSignals() as signals:
        config = recipe.load(path, overrides, trusted=True).config
        prepared = prepare(config)
        # What follows imports torch: only what has been checked waits for it.
        from nlscale.parallel.cpu import import_megatron_core

        import_megatron_core()
        from nlscale.train.loop import train

        train(config, prepared, signals)
    return 0

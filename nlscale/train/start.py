"""From a recipe to a run under way."""

from __future__ import annotations

import os
from pathlib import Path

from nlscale.checkpoint.mirror.check import check_mirror
from nlscale.cluster.life import open_files
from nlscale.cluster.life.deadline import Deadline
from nlscale.cluster.life.imports import importing
from nlscale.cluster.life.owner import refuse_if_alive
from nlscale.cluster.life.place import Place, place
from nlscale.cluster.life.signals import StopSignals
from nlscale.cluster.spread import nodes_of_a_data_group
from nlscale.config import recipe
from nlscale.config.vocabulary import ParallelConfig
from nlscale.train.prepare import prepare


def start(path: str | Path, overrides: list[str]) -> int:
    """Train a recipe, in this process or, under torchrun, as one of its ranks.

    Returns:
        The exit code of a run that has finished.

    Raises:
        UserError: as `nlscale.cluster.life.place.place`, `nlscale.cluster.life.open_files.allow`,
            `nlscale.train.prepare.prepare` and `nlscale.train.loop.train`.
    """
    here = place()  # what the environment says in part, or cannot mean, is refused before all else
    open_files.allow(here)
    Deadline().refuse_past()
    with StopSignals() as signals:
        config = recipe.load(path, overrides, trusted=True).config
        # Of several nodes not all can see it: their ranks are told together, when they have met.
        if here.world == here.local_world:
            refuse_if_alive(Path(config.run.dir))
        prepared = prepare(config)
        check_mirror(config)
        if _wants_one_queue(config.parallel, here):
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # What follows imports torch: only what has been checked waits for it.
        with importing():
            from nlscale.parallel.cpu import import_megatron_core

            import_megatron_core()
            import torch._dynamo  # noqa: F401  # which the first optimizer would import

            from nlscale.train.loop import train

        train(config, prepared, signals)
    return 0


def _wants_one_queue(parallel: ParallelConfig, here: Place) -> bool:
    """Whether the GPU is to begin with what it is asked for in the order in which it is.

    megatron-core asks first for what a tensor-parallel layer sends, then for the product that is to
    hide it. But a reduction across nodes that waits for another one would then hold up all that is
    asked for behind it, and hide nothing.
    """
    if parallel.tensor == 1:
        return False
    per_node = parallel.ranks_per_node or here.local_world
    nodes = nodes_of_a_data_group(here.world, per_node, parallel.tensor, parallel.pipeline)
    return nodes == 1 or not parallel.overlap

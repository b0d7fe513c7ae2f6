"""Training on synthetic tokens that saves, and goes on from what was saved."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from levels.level_runs import (
    VOCABULARY,
    load,
    sequences,
    spoiled_gradient,
    whole_parameters,
)

from nlscale.checkpoint.restore import restore
from nlscale.checkpoint.resume import find_checkpoint
from nlscale.checkpoint.saver import Saver
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.levels.spectrum import levels_of
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

DATA = {"fingerprint": "synthetic"}


def train(
    overrides: list[str],
    folder: Path,
    saves: tuple[int, ...] = (),
    resumes: bool = False,
    spoils: tuple[int, ...] = (),
) -> dict[str, Any]:
    """On a rank of a world: train to the end, saving after the given steps and the last.

    Args:
        overrides: of `level_runs.TINY`.
        folder: of the store.
        saves: steps after which to save, beside the last.
        resumes: begin with the newest checkpoint in the folder.
        spoils: steps with a gradient that is not finite.

    Returns:
        losses by step, and the whole parameters.
    """
    config = load([*overrides, "checkpoint.keep=100"])
    with process_groups(config) as layout:
        levels = levels_of(config)
        store = Store(folder)
        trainer = Trainer.build(config, layout, levels, VOCABULARY, draws=not resumes)
        if resumes:
            put_back(trainer, store)
        saver = Saver(trainer, DATA, None, store, lambda line: None)
        losses = {}
        while trainer.counters.step < config.train.steps:
            step = trainer.counters.step + 1
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            spoiled = spoiled_gradient(trainer.stages[-1]) if step in spoils else nullcontext()
            with spoiled:
                losses[step] = trainer.take_step(mine)[0].loss
            if step in saves or step == config.train.steps:
                saver.save()
        saver.finish()
        return {"losses": losses, "parameters": whole_parameters(trainer)}


def load_and_save(overrides: list[str], folder: Path) -> None:
    """On a rank of a world: load the newest checkpoint and write it again, without a step."""
    config = load(overrides)
    with process_groups(config) as layout:
        levels, store = levels_of(config), Store(folder)
        trainer = Trainer.build(config, layout, levels, VOCABULARY, draws=False)
        put_back(trainer, store)
        saver = Saver(trainer, DATA, None, store, lambda line: None)
        saver.save()
        saver.finish()


def put_back(trainer: Trainer, store: Store) -> None:
    """Put a trainer where the newest checkpoint's was."""
    for p in trainer.named_parameters().values():
        p.data.fill_(float("nan"))  # what is not read must not go unseen
    for shard in trainer.shards():
        shard.weights.detach().fill_(float("nan"))
    found = find_checkpoint(trainer.config, DATA, trainer.layout, store, lambda line: None)
    assert found is not None
    restore(trainer, found)


def checkpoint(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of that step, verified."""
    (found,) = (c for c in Store(folder).checkpoints() if c.step == step)
    found.verify()
    return found

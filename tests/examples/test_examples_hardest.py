"""The hook of docs/how-to/hook-into-a-run.md keeps the samples that are hardest."""

from __future__ import annotations

from pathlib import Path

import world
from train.test_train_run import SMALL, records, small_data

from nlscale.checkpoint.restore import restore
from nlscale.checkpoint.store.store import Store
from nlscale.cluster.life.signals import StopSignals
from nlscale.config import recipe
from nlscale.config.extensions import import_all
from nlscale.levels.spectrum import levels_of
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer
from nlscale.train.batches import read
from nlscale.train.loop import train
from nlscale.train.prepare import prepare


def trained(overrides: list[str]) -> tuple[list[int], dict[int, float]]:
    """The buffer at the end of a run of 12 steps, and the loss of each of the last samples by a
    model restored from its last checkpoint, row by row."""
    import_all(["examples.hardest"])
    config = recipe.load(None, [*SMALL, *overrides]).config
    prepared = prepare(config)
    with StopSignals() as signals:
        train(config, prepared, signals)
    last = Store(Path(config.run.dir) / "checkpoints").checkpoints()[-1]
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), prepared.vocabulary)
        restore(trainer, last)
        (model,), reader = trainer.stages, prepared.readers[0]
        losses = {}
        for number in range(96):
            batch = trainer.to_batch(*read(reader, [number]))
            losses[number] = float(model(batch.tokens, batch.targets).detach().double().mean())
    return last.state["noted"]["the buffer"]["numbers"], losses


def test_the_buffer_holds_the_hardest_samples_of_the_last_update(tmp_path: Path) -> None:
    data = small_data(tmp_path, documents=40, held_out=0.1)
    asked = [f"data.dir={data}", f"run.dir={tmp_path}/run", "train.steps=12", "train.micro_batch=4"]
    hook = "hooks=[{name: hardest, level: level2}]"
    ((buffer, losses),) = world.run(1, trained, [*asked, hook])
    assert len(set(buffer)) == 32
    # of the last 64 samples the hardest are in it, and those of it are in their order
    assert [losses[n] for n in buffer] == sorted((losses[n] for n in buffer), reverse=True)
    left_out = [losses[n] for n in range(32, 96) if n not in buffer]
    assert len(left_out) >= 32 and max(left_out) <= min(losses[n] for n in buffer)
    called = [r for r in records(tmp_path / "run", "evaluation") if r["name"] == "hardest"]
    assert called[-1]["step"] == 12 and abs(called[-1]["loss"] - losses[buffer[0]]) < 1e-4

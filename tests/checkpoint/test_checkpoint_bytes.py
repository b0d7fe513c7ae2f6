"""Ranks share what there is to write and to read, by bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import world
from checkpoint.resume_runs import DATA, checkpoint
from levels.level_runs import load, sequences

from nlscale.checkpoint.restore import restore
from nlscale.checkpoint.resume import find_checkpoint
from nlscale.checkpoint.saver import Saver
from nlscale.checkpoint.store.store import Store
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

VOCABULARY = 2000  # an embedding larger than what a rank is to write
MODEL = [
    "model.layers=3",
    "train.global_batch=8",
    "model.d_model=128",
    "levels=[1,4]",
    "levels.stagger=false",
    "data.sequence_length=16",
    "train.steps=9",
    "checkpoint.pending=canonical",
]


def save(overrides: list[str], folder: Path) -> None:
    """Train one step, which leaves moments of the fast level and windows of the slow, and save."""
    config = load([*MODEL, *overrides])
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 128), VOCABULARY)
        trainer.take_step(sequences(config, 1)[layout.data_rank :: layout.data_size])
        with Saver(trainer, DATA, None, Store(folder), lambda line: None) as saver:
            saver.save()
            saver.finish()


def read(overrides: list[str], folder: Path) -> tuple[int, int]:
    """Bytes that this rank reads to verify the checkpoint, and to go on from it."""
    config = load([*MODEL, *overrides])
    with process_groups(config) as layout:
        levels, store = spectrum(config.levels, 128), Store(folder)
        trainer = Trainer.build(config, layout, levels, VOCABULARY, draws=False)
        for _ in range(2):  # the first time modules are read, too
            began = _bytes_read()
            found = find_checkpoint(config, DATA, layout, store, lambda line: None)
            assert found is not None
            verified = _bytes_read()
            restore(trainer, found)
            dist.barrier()
        return verified - began, _bytes_read() - verified


def _bytes_read() -> int:
    """Of this process, by system calls, from files."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.parametrize(
    ("ranks", "per_node", "layout"),
    [
        (8, 2, []),
        (6, 2, ["train.global_batch=6"]),
        (4, 2, ["parallel.tensor=2"]),
    ],
    ids=["four nodes", "three nodes", "a tensor rank a GPU of the node"],
)
def test_files_are_equally_large_and_are_read_once(
    tmp_path: Path, ranks: int, per_node: int, layout: list[str]
) -> None:
    world.run(ranks, save, layout, tmp_path, ranks_per_node=per_node)
    found = checkpoint(tmp_path, 1)
    assert any(name.startswith("window/") for name in found.tensors())
    sizes = [path.stat().st_size for path in found.path.glob("*.distcp")]
    assert len(sizes) == ranks
    assert max(sizes) < 1.1 * sum(sizes) / ranks
    total = sum(path.stat().st_size for path in found.path.iterdir())
    counted = world.run(ranks, read, layout, tmp_path, ranks_per_node=per_node)
    verified, restored = (sum(column) for column in zip(*counted, strict=True))
    assert total <= verified < 1.3 * total
    assert total / 2 < restored < 1.3 * total


def test_other_ranks_read_only_what_they_hold(tmp_path: Path) -> None:
    world.run(4, save, [], tmp_path, ranks_per_node=2)
    total = sum(path.stat().st_size for path in checkpoint(tmp_path, 1).path.iterdir())
    counted = world.run(8, read, [], tmp_path, ranks_per_node=2)
    assert sum(restored for _, restored in counted) < 1.6 * total

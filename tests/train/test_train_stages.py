"""Runs in stages: a batch that grows, and sequences of another length at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import world
from numpy.typing import NDArray
from train.test_train_resume import only_until
from train.test_train_run import SMALL, records, run, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.inspection import inspection
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, stage_of
from nlscale.data.reader import Samples
from nlscale.data.shards import TokenShards
from nlscale.errors import UserError
from nlscale.train.batches import StepReader
from nlscale.train.prepare import prepare

STEPS = 8
STAGES = [
    f"train.steps={STEPS}",
    "train.global_batch=[{from: 0%, size: 4}, {from: 3 steps, size: 8}]",
    "data.stages=[{from: 5 steps, sequence_length: 64}]",
    "train.micro_batch=1",
    "checkpoint.every=1 step",
    "checkpoint.keep=8",
]
TOKENS = [4 * 32] * 3 + [8 * 32] * 2 + [8 * 64] * 3
"""Of each step."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run on one rank that was not stopped, and its summary."""
    folder = tmp_path_factory.mktemp("whole")
    (summary,) = world.run(1, run, [*STAGES, f"data.dir={data}", f"run.dir={folder}"])
    return folder, summary


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def test_what_is_counted_is_the_steps_own(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    taken = records(folder, "train")
    assert [r["tokens"] for r in taken] == np.cumsum(TOKENS).tolist()
    assert summary["tokens"] == sum(TOKENS)
    for record, tokens in zip(taken, TOKENS, strict=True):
        speed = tokens / record["step_seconds"]
        assert record["tokens_per_second"] == pytest.approx(speed)
    states = [c.state for c in Store(folder / "checkpoints").checkpoints()]
    assert [s["samples"] for s in states] == [4, 8, 12, 20, 28, 36, 44, 52]
    assert "8 steps, 2.43k tokens in all" in (folder / "train.log").read_text()
    assert "128, then 256, then 512 tokens a step" in (folder / "train.log").read_text()


def test_a_window_is_filled_by_tokens(whole: tuple[Path, dict[str, Any]]) -> None:
    # of the slowest level the first block updates at steps 4 and 8, the second at 2 and 6
    folder, _ = whole
    filled = [r["levels"]["level2"]["window_fill"] for r in records(folder, "train")]
    first = [sum(TOKENS[:n]) / sum(TOKENS[:4]) for n in (1, 2, 3)]
    second = [sum(TOKENS[2:n]) / sum(TOKENS[2:6]) for n in (3, 4, 5)]
    assert filled[2] == pytest.approx(max(first[2], second[0]))
    assert filled[3] == pytest.approx(second[1])
    assert filled[4] == pytest.approx(max(second[2], TOKENS[4] / sum(TOKENS[4:8])))
    for checkpoint in Store(folder / "checkpoints").checkpoints():
        (_, _, level) = inspection(checkpoint)["levels"]
        assert level["window_fill"] == filled[checkpoint.step - 1]


def test_a_run_that_goes_on_across_a_border_is_the_one_that_never_stopped(
    data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    only_until(tmp_path, 3)  # where the batch grows; the sequences do later
    world.run(1, run, [*STAGES, f"data.dir={data}", f"run.dir={tmp_path}"])
    assert "step 3 of 8" in (tmp_path / "train.log").read_text()
    assert losses(tmp_path) == losses(whole[0])
    there, here = (
        Checkpoint(f / f"checkpoints/step-{STEPS:08}", STEPS) for f in (whole[0], tmp_path)
    )
    assert compare(here, there)["bitwise"]


def test_other_ranks_take_the_same_steps_from_the_beginning_and_from_the_middle(
    data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    keys = [*STAGES, f"data.dir={data}", f"run.dir={tmp_path}"]
    world.run(4, run, keys)
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)
    only_until(tmp_path, 5)  # where the sequences become longer
    world.run(2, run, [*keys, "parallel.pipeline=2"])
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_a_validation_keeps_its_length_and_has_that_of_the_end_beside_it(
    data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    keys = [f"data.dir={data}", "train.steps=1", "train.global_batch=4", "train.micro_batch=1"]
    alone = {}
    for length in (32, 64):
        folder = tmp_path / str(length)
        world.run(1, run, [*keys, f"data.sequence_length={length}", f"run.dir={folder}"])
        alone[length] = records(folder, "validation")[0]
    found = records(whole[0], "validation")
    assert found[0]["loss"] == alone[32]["loss"] and "of_end" not in alone[64]
    same = {key: alone[64][key] for key in ("loss", "bits_per_byte")}
    assert found[0]["of_end"] == {"sequence_length": 64, **same}
    assert whole[1]["val_of_end"] == found[-1]["of_end"]
    assert whole[1]["final_val_loss"] == found[-1]["loss"]


LONG = [
    "train.steps=80",
    "train.global_batch=[{from: 0%, size: 4}, {from: 25%, size: 8}, {from: 75%, size: 4}]",
    "data.stages=[{from: 50%, sequence_length: 64}, {from: 75%, sequence_length: 32}]",
    "train.micro_batch=1",
]


def read_by(data: Path, ranks: int) -> list[NDArray[np.int64]]:
    """What that many ranks read at each step, in the order of the samples: [rows, length + 1]."""
    config = recipe.load(None, [*SMALL, *LONG, f"data.dir={data}"]).config
    prepared = prepare(config)
    stages, readers = curriculum(config), []
    for rank in range(ranks):
        trainer = SimpleNamespace(
            counters=SimpleNamespace(step=0, samples=0),
            config=config,
            layout=SimpleNamespace(data_size=ranks, data_rank=rank),
            to_batch=lambda rows, separator, size, counts, of: rows,
        )
        readers.append((trainer, StepReader(trainer, prepared)))  # type: ignore[arg-type]
    steps = []
    for step in range(1, config.train.steps + 1):
        of_ranks = [reader.take() for _, reader in readers]
        steps.append(
            np.concatenate([part for parts in zip(*of_ranks, strict=True) for part in parts])
        )
        for trainer, _ in readers:
            trainer.counters.step = step
            trainer.counters.samples += stage_of(stages, step).global_batch
    return steps


def test_every_number_of_ranks_reads_the_same_samples_each_once_an_epoch(data: Path) -> None:
    alone = read_by(data, 1)
    assert [rows.shape for rows in alone] == (
        [(4, 33)] * 20 + [(8, 33)] * 20 + [(8, 65)] * 20 + [(4, 33)] * 20
    )
    for ranks in (2, 4):
        for mine, theirs in zip(alone, read_by(data, ranks), strict=True):
            assert np.array_equal(mine, theirs)
    shards = TokenShards(data, "train")
    for length in (32, 64):
        samples = Samples(shards, length)
        seen = [tuple(row) for rows in alone if rows.shape[1] == length + 1 for row in rows]
        assert len(seen) > len(samples), "an epoch must end on the way"
        every = sorted(tuple(samples[i]) for i in range(len(samples)))
        assert sorted(seen[: len(samples)]) == every
        assert seen[: len(samples)] != [tuple(samples[i]) for i in range(len(samples))]
        assert len(set(seen[len(samples) : 2 * len(samples)])) == len(seen[len(samples) :])


def test_data_too_short_for_a_stage_are_refused_before_the_run(data: Path) -> None:
    keys = [*SMALL, f"data.dir={data}", "data.stages=[{from: 50%, sequence_length: 60000}]"]
    with pytest.raises(UserError, match="one sample of sequence length 60,000 needs"):
        prepare(recipe.load(None, keys).config)

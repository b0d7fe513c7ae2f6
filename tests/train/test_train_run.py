"""Whole runs through the training loop, on small text made here."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import world

from nlscale.cluster.life.signals import StopSignals
from nlscale.config import recipe
from nlscale.data.build import build
from nlscale.errors import TrainingFailed, UserError
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer
from nlscale.train.loop import train
from nlscale.train.prepare import prepare
from nlscale.train.start import start

SMALL = [
    "data.sequence_length=32", "model.layers=2", "model.d_model=64", "model.heads=2",
    "model.memory.chunk=16", "levels=[1,2,4]", "train.global_batch=8", "train.micro_batch=2",
    "train.steps=9", "train.validate_every=4", "train.validation_sequences=8", "train.dtype=fp32",
    "optimizer.warmup_steps=3",
]  # fmt: skip


def small_data(folder: Path, documents: int, held_out: float) -> Path:
    """Shards of text made here, in that folder."""
    draw = random.Random(0)
    words = ["level", "window", "period", "phase", "memory", "slow", "fast", "node"]
    for i in range(documents):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=400)))
    out = folder / "shards"
    build([str(folder)], "bytes", out, held_out=held_out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


def run(overrides: list[str]) -> dict[str, Any]:
    """What `nlscale train` does, on this rank; an error of the user's as its text and code."""
    config = recipe.load(None, [*SMALL, *overrides]).config
    try:
        with StopSignals() as signals:
            return train(config, prepare(config), signals)
    except UserError as error:
        return {"error": str(error), "code": error.exit_code}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # a run may be writing one more
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_a_run_leaves_what_it_says(data: Path, tmp_path: Path) -> None:
    here = [f"data.dir={data}", f"run.dir={tmp_path}"]
    (summary,) = world.run(1, run, here, figures=True)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    steps = records(tmp_path, "train")
    assert [r["step"] for r in steps] == list(range(1, 10))
    assert [r["step"] for r in records(tmp_path, "validation")] == [0, 4, 8, 9]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert steps[-1]["tokens"] == 9 * 8 * 32
    counts = [(level["updates"], level["reductions"]) for level in summary["levels"]]
    # 9 steps of periods 1, 2, 4; staggered blocks of the last start at step 2 or 4, and the
    # partial windows at the end are applied
    assert counts == [(9, 9), (5, 5), (3, 3)]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # the embedding: a row of 64 channels a byte
    assert summary["parameters"] - summary["parameters_non_embedding"] == 64 * 256
    six = 6 * summary["parameters_non_embedding"] * summary["tokens"]
    assert six < summary["flops"] < 2 * six


def queues_of_a_gpu(overrides: list[str], given: str | None) -> str | None:
    """What `nlscale train` says of them to the driver, which reads it when a GPU is first used."""
    if given is not None:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = given
    start("quickstart", [*SMALL, *overrides, "train.steps=1", "train.validation_sequences=2"])
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")


@pytest.mark.parametrize(
    ("tensor", "nodes", "given", "then"),
    [(1, 1, None, None), (2, 1, None, "1"), (2, 1, "8", "8"), (2, 2, None, None)],
)
def test_tensor_parallel_layers_overlap_on_one_queue_where_nothing_else_waits_in_it(
    tensor: int, nodes: int, given: str | None, then: str | None, data: Path, tmp_path: Path
) -> None:
    here = [f"data.dir={data}", f"run.dir={tmp_path}", f"parallel.tensor={tensor}"]
    ranks = tensor * nodes
    said = world.run(ranks, queues_of_a_gpu, here, given, ranks_per_node=tensor)
    assert said == [then] * ranks


def test_a_finished_run_is_not_run_again_nor_overwritten(data: Path, tmp_path: Path) -> None:
    here = [f"data.dir={data}", f"run.dir={tmp_path}"]
    (first,) = world.run(1, run, here)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (again,) = world.run(1, run, here)
    (other,) = world.run(1, run, [*here, "optimizer.learning_rate=0.002"])
    assert again == first
    assert "holds another finished run: optimizer.learning_rate 0.001 -> 0.002" in other["error"]
    assert other["code"] == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_loss_does_not_depend_on_the_number_of_ranks(data: Path, tmp_path: Path) -> None:
    curves = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        world.run(
            ranks, run, [f"data.dir={data}", f"run.dir={folder}"], ranks_per_node=min(2, ranks)
        )
        curves[ranks] = [r["loss"] for r in records(folder, "train")]
        curves[ranks] += [r["loss"] for r in records(folder, "validation")]
    assert curves[2] == pytest.approx(curves[1], rel=2e-5)
    assert curves[4] == pytest.approx(curves[1], rel=2e-5)


def test_a_run_that_diverges_ends_with_a_clear_error(data: Path, tmp_path: Path) -> None:
    overrides = [f"data.dir={data}", f"run.dir={tmp_path}", "optimizer.learning_rate=1e30"]
    results = world.run(2, run, [*overrides, "train.max_dropped_steps=3", "train.steps=40"])
    assert all(r["code"] == TrainingFailed.exit_code for r in results)
    assert "3 steps in a row were dropped" in results[0]["error"]
    assert "lower optimizer.learning_rate" in results[0]["error"].lower()
    assert "not finite (3)" in results[0]["error"]
    assert not (tmp_path / "summary.json").exists()


def run_where_all_are_spikes(overrides: list[str]) -> dict[str, Any]:
    """Anything above a hundredth of the median is a "spike": every step, once there are enough."""
    config = recipe.load(None, [*SMALL, *overrides]).config
    config.train.drop_spikes = 0.01  # no recipe may say so
    try:
        with StopSignals() as signals:
            return train(config, prepare(config), signals)
    except UserError as error:
        return {"error": str(error), "code": error.exit_code}


def test_spikes_are_dropped_where_asked_for(data: Path, tmp_path: Path) -> None:
    overrides = [f"data.dir={data}", f"run.dir={tmp_path}", "train.steps=14"]
    (result,) = world.run(1, run_where_all_are_spikes, [*overrides, "train.max_dropped_steps=9"])
    assert result["dropped_steps"] == 4
    steps = records(tmp_path, "train")
    assert [r["dropped_steps"] for r in steps] == [0] * 10 + [1, 2, 3, 4]
    assert [r["dropped_because"] for r in steps[:10]] == [None] * 10
    assert steps[10]["dropped_because"].startswith(f"spike: loss {steps[10]['loss']:.4g} above ")
    assert result["tokens"] == 10 * 8 * 32


def test_a_run_that_drops_finite_losses_says_so_and_what_to_mend(
    data: Path, tmp_path: Path
) -> None:
    overrides = [f"data.dir={data}", f"run.dir={tmp_path}", "train.steps=14"]
    results = world.run(2, run_where_all_are_spikes, [*overrides, "train.max_dropped_steps=3"])
    for result in results:
        assert result["code"] == TrainingFailed.exit_code
        assert "3 steps in a row were dropped" in result["error"]
        assert "spike (3), with finite losses of" in result["error"]
        assert "train.drop_spikes=0.01 is too low" in result["error"]
        assert "not finite" not in result["error"] and "learning_rate" not in result["error"]


def spoil_a_replica(where: str) -> str | None:
    config = recipe.load(None, [*SMALL, "data.dir=none"]).config
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 256), 256)
        tokens = torch.arange(64).view(2, 32) + layout.rank
        trainer.take_step([Batch(tokens, tokens, 2)])
        if layout.rank == layout.world - 1 and where == "parameter":
            weight = trainer.stages[0].blocks["1"].cms.mlps[2].down.weight
            weight.data.view(-1)[5] += 1e-6
        if layout.rank == layout.world - 1 and where == "optimizer":
            inner = trainer.optimizer.groups[0].optimizer.optimizer
            next(iter(inner.state.values()))["exp_avg"].view(-1)[5] += 1e-3
        return trainer.optimizer.replica_difference(trainer.named_parameters())


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", None),
        ("parameter", "blocks.1.cms.mlps.2.down.weight"),
        ("optimizer", "exp_avg of the optimizer, level 0 phase 0"),
    ],
)
def test_the_replica_check_names_what_differs(where: str, says: str | None) -> None:
    results = world.run(2, spoil_a_replica, where, ranks_per_node=1)
    assert len(set(results)) == 1, "every rank comes to the same verdict"
    assert results[0] == says or says in results[0]

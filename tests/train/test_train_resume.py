"""Runs that are killed and started again, as a user would: the same command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import world
from train.test_train_run import records, run, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Checkpoint, Store

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)


def keys(data: Path, folder: Path) -> list[str]:
    return [f"data.dir={data}", f"run.dir={folder}", "checkpoint.every=4 steps"]


def only_until(folder: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint at that step."""
    (folder / "summary.json").unlink()
    store = Store(folder / "checkpoints")
    for checkpoint in store.checkpoints():
        if checkpoint.step > step:
            checkpoint.path.rename(folder / f"later-{checkpoint.step}")


def evaluated(folder: Path) -> list[dict[str, Any]]:
    """The records of evaluations, but for the clock."""
    found = records(folder, "evaluation")
    return [{k: v for k, v in one.items() if k not in ("time", "seconds")} for one in found]


def test_the_same_command_goes_on_and_ends_the_same(data: Path, tmp_path: Path) -> None:
    here = [*keys(data, tmp_path), f"train.steps={STEPS}", "evaluate=[positions]"]
    here += ["train.validation_sequences=7"]  # micro batches of two
    (first,) = world.run(1, run, here)
    index = json.loads((data / "index.json").read_text())
    assert index["splits"]["train"]["tokens"] // 32 < STEPS * 8, "an epoch must end on the way"
    assert [c.step for c in Store(tmp_path / "checkpoints").checkpoints()] == [36, 40]
    whole, asked = records(tmp_path, "train"), evaluated(tmp_path)
    only_until(tmp_path, 36)
    (second,) = world.run(1, run, here)
    assert "resuming from" in (tmp_path / "train.log").read_text()
    volatile = {"tokens_per_second", "goodput", "waits", "peak_memory_bytes"}
    assert {k: v for k, v in second.items() if k not in volatile} == {
        k: v for k, v in first.items() if k not in volatile
    }
    again = records(tmp_path, "train")
    assert [(r["step"], r["loss"], r["tokens"]) for r in again] == [
        (r["step"], r["loss"], r["tokens"]) for r in whole
    ]
    assert evaluated(tmp_path) == asked
    for one, validation in zip(asked, records(tmp_path, "validation"), strict=True):
        mean = (8 * one["0-8/loss"] + 24 * one["8-32/loss"]) / 32
        assert mean == pytest.approx(validation["loss"], rel=1e-6)
    resumed = Store(tmp_path / "checkpoints").checkpoints()[-1]
    assert compare(resumed, Checkpoint(tmp_path / "later-40", STEPS))["bitwise"]


def test_another_learning_rate_is_refused_before_anything_runs(data: Path, tmp_path: Path) -> None:
    here = [*keys(data, tmp_path), "train.steps=8"]
    world.run(1, run, here)
    only_until(tmp_path, 4)
    (refused,) = world.run(1, run, [*here, "optimizer.learning_rate=0.5"])
    assert "optimizer.learning_rate: 0.001 -> 0.5" in refused["error"]
    assert refused["code"] == 2
    (allowed,) = world.run(
        1, run, [*here, "optimizer.learning_rate=0.5", "resume.allow=[optimizer.learning_rate]"]
    )
    assert allowed["steps"] == 8
    assert records(tmp_path, "train")[-1]["levels"]["level0"]["learning_rate"] > 0.01


def test_a_broken_checkpoint_is_passed_over_and_said(data: Path, tmp_path: Path) -> None:
    here = [*keys(data, tmp_path), "train.steps=12", "checkpoint.keep=3"]
    (first,) = world.run(1, run, here)
    only_until(tmp_path, 8)
    newest = Store(tmp_path / "checkpoints").checkpoints()[-1]
    (shard,) = newest.path.glob("*.distcp")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    (second,) = world.run(1, run, here)
    log = (tmp_path / "train.log").read_text()
    assert "step-00000008" in log and "sha256" in log
    assert "step-00000004, step 4" in log
    assert second["final_val_loss"] == first["final_val_loss"]


def test_where_checkpoints_cannot_be_written_no_run_starts(data: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    (result,) = world.run(1, run, [*keys(data, tmp_path), "train.steps=30"])
    assert result["code"] == 2 and "cannot write checkpoints in" in result["error"]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.root
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    # room for two checkpoints of 2 MB, where three are to be kept
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], check=True)
    try:
        here = [*keys(data, tmp_path), "train.steps=30", "checkpoint.keep=3"]
        results = world.run(2, run, here)
        for result in results:
            assert result["code"] == 3, result
            assert "No space left on device" in result["error"]
        assert [c.step for c in Store(folder).checkpoints()] == [4, 8]
        for checkpoint in Store(folder).checkpoints():
            checkpoint.verify()
        assert len(records(tmp_path, "train")) < 20, "it must end soon after the save that failed"
        subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
        (resumed,) = world.run(1, run, here)
        assert resumed["steps"] == 30, resumed
    finally:
        subprocess.run(["umount", str(folder)], check=True)


RECIPE = "recipes/quickstart.yaml"


# What is asked of the run does not depend on its size.
SMALL = ["model.layers=2", "model.d_model=32", "model.heads=1", "data.sequence_length=32"]


def signalled(data: Path) -> list[str]:
    return [
        *("train", RECIPE, f"data.dir={data}", *SMALL),
        *("train.steps=60", "train.validation_sequences=8"),
        *("checkpoint.pending=exact", "train.validate_every=50", "train.micro_batch=4"),
    ]


@pytest.fixture(scope="module")
def never_stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The last checkpoint of the run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("never")
    train(signalled(data), folder)
    return Store(folder / "checkpoints").checkpoints()[-1]


def train(
    command: list[str], folder: Path, during: Callable[[list[int]], None] | None = None
) -> list[world.Ended]:
    """A run of two ranks in a folder, to its end unless something happens to it."""
    nothing_happens = during is None
    ended = world.command(
        2, [*command, f"run.dir={folder}"], folder.with_name(f"{folder.name}-ranks"),
        during or (lambda pids: None),
    )  # fmt: skip
    assert not nothing_happens or [rank.code for rank in ended] == [0, 0], ended[0].output
    return ended


def wait_for_steps(folder: Path, steps: int) -> None:
    while not (folder / "metrics.jsonl").exists() or len(records(folder, "train")) < steps:
        time.sleep(0.02)


@pytest.mark.parametrize("to", ["torchrun", "one rank"])
def test_a_signal_ends_all_ranks_after_the_same_step_and_changes_nothing(
    data: Path, never_stopped: Checkpoint, tmp_path: Path, to: str
) -> None:
    command, stopped = signalled(data), tmp_path / "stopped"

    def one_rank(pids: list[int]) -> None:
        wait_for_steps(stopped, 7)
        os.kill(pids[-1], signal.SIGUSR1)

    if to == "torchrun":
        said = stopped_torchrun(command, stopped)
    else:
        ended = train(command, stopped, one_rank)
        assert [rank.code for rank in ended] == [75, 75]
        said = "".join(rank.output for rank in ended)
    last = records(stopped, "train")[-1]["step"]
    assert 7 <= last < 60
    assert f"stopped after step {last}" in said and "the same command goes on from it" in said
    assert said.count("nlscale: stopped after step") == 1
    assert [c.step for c in Store(stopped / "checkpoints").checkpoints()] == [last]
    train(command, stopped)
    end = Store(stopped / "checkpoints").checkpoints()[-1]
    assert compare(end, never_stopped)["bitwise"]


def stopped_torchrun(command: list[str], folder: Path) -> str:
    """What torchrun and its ranks say on standard error when torchrun is told to stop."""
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "nlscale", *command, f"run.dir={folder}"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_steps(folder, 7)
    torchrun.send_signal(signal.SIGTERM)
    _, said = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    return said


def test_kill_9_at_any_moment_loses_nothing(data: Path, tmp_path: Path) -> None:
    """The whole run, killed three times at random moments."""
    command = [
        *("train", RECIPE, f"data.dir={data}", *SMALL),
        *("train.steps=30", "train.validation_sequences=8"),
        *("checkpoint.every=3 steps", "train.validate_every=10", "train.micro_batch=4"),
    ]
    never = tmp_path / "never"
    began = time.monotonic()
    train(command, never)
    took = time.monotonic() - began
    draw = random.Random(int(time.time()))
    killed, ends = tmp_path / "killed", []

    def kill_all(pids: list[int]) -> None:
        time.sleep(draw.uniform(0.2, 1.0) * took)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    for _ in range(3):
        train(command, killed, kill_all)
        ends.append([c.step for c in Store(killed / "checkpoints").checkpoints()][-1:])
    train(command, killed)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (never, killed)]
    assert summaries[0]["final_val_loss"] == summaries[1]["final_val_loss"], ends
    last = [Store(run / "checkpoints").checkpoints()[-1] for run in (killed, never)]
    assert compare(*last)["bitwise"], ends
    steps = [[(r["step"], r["loss"]) for r in records(run, "train")] for run in (never, killed)]
    assert steps[0] == steps[1], ends

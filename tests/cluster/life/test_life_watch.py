"""A rank that is lost, hangs or fails ends all ranks in the stated time, with one reason."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import world
from train.test_train_run import records, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store
from nlscale.data.reader import BatchReader
from nlscale.levels.engine import LevelOptimizer
from nlscale.parallel.consensus import Consensus

RECIPE = """
data: {sequence_length: 32}
model: {layers: 2, d_model: 64, heads: 2, memory: {chunk: 16}}
levels: [1, 2, 4]
train: {steps: 60, global_batch: 8, micro_batch: 2, dtype: fp32, validation_sequences: 4}
optimizer: {warmup_steps: 2}
checkpoint: {every: 4 steps}
"""
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)


def train(data: Path, folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return ["train", str(recipe), f"data.dir={data}", f"run.dir={folder / 'run'}", *overrides]


def at_step(run: Path, step: int) -> None:
    """Wait until the run has taken that step."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists() and len(records(run, "train")) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


def saved(run: Path, step: int) -> None:
    """Wait until the checkpoint of that step is written, and some steps after: no rank is in it."""
    at_step(run, step)
    until = time.monotonic() + 60
    while f"checkpoint at step {step}: " not in (run / "train.log").read_text():
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.02)
    at_step(run, len(records(run, "train")) + 3)


def reasons(ended: list[world.Ended]) -> list[str]:
    """The lines in which some rank says why the run ends."""
    lines = [line for rank in ended for line in rank.output.splitlines()]
    return [line for line in lines if line.startswith("nlscale: ") and "stopping" not in line]


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    def kill(pids: list[int]) -> None:
        saved(tmp_path / "a" / "run", 4)
        os.kill(pids[2], signal.SIGKILL)

    # and a checkpoint after the last step
    once = ["train.steps=40", "checkpoint.every=null", "checkpoint.steps=[4]"]
    here = train(data, tmp_path / "a", *once)
    ended = world.command(4, here, tmp_path / "a", kill, ranks_per_node=2)
    assert [rank.code for rank in ended] == [5, 5, -signal.SIGKILL, 5]
    assert all(rank.seconds < 15 for rank in ended)
    (reason,) = reasons(ended)
    assert f"rank 2 on {HOST}, last heard in " in reason and " of step " in reason
    assert "Traceback" not in "".join(rank.output for rank in ended)
    again = world.command(4, here, tmp_path / "a", ranks_per_node=2)
    assert [rank.code for rank in again] == [0] * 4
    assert "resuming from" in again[0].output
    whole = world.command(4, train(data, tmp_path / "b", *once), tmp_path / "b", ranks_per_node=2)
    assert [rank.code for rank in whole] == [0] * 4
    stores = [Store(tmp_path / name / "run" / "checkpoints") for name in "ab"]
    assert compare(*(store.checkpoints()[-1] for store in stores))["bitwise"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_missed_after_the_silence_allowed(
    data: Path, tmp_path: Path, victim: int
) -> None:
    def stop(pids: list[int]) -> None:
        at_step(tmp_path / "run", 6)
        os.kill(pids[victim], signal.SIGSTOP)
        until = time.monotonic() + 20
        while Path(f"/proc/{pids[1 - victim]}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(pids[victim], signal.SIGKILL)

    here = train(data, tmp_path, "timeouts.silence=4")
    ended = world.command(2, here, tmp_path, stop)
    others = [rank for i, rank in enumerate(ended) if i != victim]
    assert [rank.code for rank in others] == [5]
    assert others[0].seconds < 0.5, "it must have ended while the other was stopped"
    (reason,) = reasons(ended)
    if victim == 0:  # which holds the store
        assert f"rank 1 on {HOST} cannot reach 127.0.0.1:" in reason
    else:
        assert f"lost rank 1: nothing heard for 4 s (rank 1 on {HOST}, last heard in" in reason


def die_in_a_reduction() -> None:
    """Rank 2, in the third step, with a reduction across nodes under way."""
    from nlscale.config.vocabulary import WireFormat
    from nlscale.levels import wire

    reduce, start_step = wire._SUMS[WireFormat.fp32, False], LevelOptimizer.start_step
    steps: list[int] = []

    def dying(*args: object) -> None:
        if os.environ["RANK"] == "2" and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        reduce(*args)  # type: ignore[arg-type]

    def count(self: LevelOptimizer, step: int) -> None:
        steps.append(step)
        start_step(self, step)

    wire._SUMS[WireFormat.fp32, False] = dying
    LevelOptimizer.start_step = count  # type: ignore[method-assign]


def test_a_rank_that_dies_in_a_reduction_across_nodes_ends_all(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path, "parallel.bucket_size=2000")
    ended = world.command(4, here, tmp_path, before=die_in_a_reduction, ranks_per_node=2)
    assert [rank.code for rank in ended] == [5, 5, -signal.SIGKILL, 5]
    (reason,) = reasons(ended)
    assert "lost rank 2: " in reason and f"rank 2 on {HOST}, last heard in " in reason
    assert "Traceback" not in "".join(rank.output for rank in ended)


def hang_on_rank_1() -> None:
    read = BatchReader.read

    def slow(self: BatchReader, first: int, count: int) -> object:
        if os.environ["RANK"] == "1" and first >= 8 * 6:
            time.sleep(600)
        return read(self, first, count)

    BatchReader.read = slow  # type: ignore[method-assign, assignment]


def test_a_rank_that_hangs_is_named_with_what_it_hangs_in(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path, "timeouts.step=4")
    ended = world.command(3, [*here, "train.global_batch=6"], tmp_path, before=hang_on_rank_1)
    assert [rank.code for rank in ended] == [5, 5, 5]
    (reason,) = reasons(ended)
    assert f"rank 1 on {HOST} hangs: " in reason
    assert "'reading data' of step " in reason and "while the others are in " in reason


def test_ranks_that_do_not_come_are_named(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path, "timeouts.startup=3")
    ended = world.command(4, here, tmp_path, started=3, ranks_per_node=2)
    assert [rank.code for rank in ended] == [5, 5, 5]
    (reason,) = reasons(ended)
    assert f"1 of 4 ranks did not come within 3 s: rank 3; those that came are on {HOST}" in reason


def test_a_first_rank_that_does_not_come_is_named(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path, "timeouts.startup=3")
    alone = {"RANK": "1", "LOCAL_RANK": "1"}
    (ended,) = world.command(2, here, tmp_path, started=1, environment=alone)
    assert ended.code == 5
    (reason,) = reasons([ended])
    assert f"rank 1 on {HOST} did not reach the first rank at 127.0.0.1:" in reason


def fail_on_rank_1() -> None:
    _fail_on(lambda rank: rank == 1)


def fail_on_all() -> None:
    _fail_on(lambda rank: True)


def _fail_on(these: object) -> None:
    update = LevelOptimizer.update

    def fail(self: LevelOptimizer, step: int, consensus: Consensus) -> object:
        if these(int(os.environ["RANK"])):  # type: ignore[operator]
            raise ZeroDivisionError("of the test")
        return update(self, step, consensus)

    LevelOptimizer.update = fail  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("before", [fail_on_rank_1, fail_on_all])
def test_an_error_has_one_traceback(data: Path, tmp_path: Path, before: object) -> None:
    ended = world.command(4, train(data, tmp_path), tmp_path, before=before)  # type: ignore[arg-type]
    assert [rank.code for rank in ended] == [1] * 4
    said = [rank.output.count("ZeroDivisionError: of the test") for rank in ended]
    assert sum(said) == 1
    assert before is fail_on_all or said[1] == 1
    assert sum(rank.output.count("Traceback") for rank in ended) == 1


def interrupt(run: Path, times: int) -> Callable[[list[int]], None]:
    """Ctrl-C as a terminal sends it: to every process, once or twice."""

    def send(pids: list[int]) -> None:
        at_step(run, 6)
        for i in range(times):
            time.sleep(1.2 * i)  # a second one within a second counts as the same
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)

    return send


def test_control_c_stops_after_the_step_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path, "train.steps=4000", "checkpoint.every=1000 steps")
    ended = world.command(2, here, tmp_path, interrupt(tmp_path / "run", 1))
    assert [rank.code for rank in ended] == [75, 75]
    (reason,) = reasons(ended)
    assert "(SIGINT) with a checkpoint; the same command goes on from it" in reason
    assert "stopping after this step; Ctrl-C again: now" in ended[0].output
    assert Store(tmp_path / "run" / "checkpoints").checkpoints()[-1].step < 1000


def hang_when_told() -> None:
    read = BatchReader.read

    def slow(self: BatchReader, first: int, count: int) -> object:
        time.sleep(600 if first >= 8 * 6 else 0)
        return read(self, first, count)

    BatchReader.read = slow  # type: ignore[method-assign, assignment]


def test_control_c_twice_stops_now(data: Path, tmp_path: Path) -> None:
    here = train(data, tmp_path)
    ended = world.command(2, here, tmp_path, interrupt(tmp_path / "run", 2), before=hang_when_told)
    assert [rank.code for rank in ended] == [130, 130]
    assert all(rank.seconds < 20 for rank in ended)
    assert "Traceback" not in "".join(rank.output for rank in ended)


def test_a_signal_before_the_first_step_ends_at_once(data: Path, tmp_path: Path) -> None:
    def early(pids: list[int]) -> None:
        time.sleep(3)  # one of two ranks has come: it waits for the other
        os.kill(pids[0], signal.SIGTERM)

    (ended,) = world.command(2, train(data, tmp_path), tmp_path, early, started=1)
    assert ended.code == 75 and ended.seconds < 5
    assert "stopped before the first step (SIGTERM)" in ended.output

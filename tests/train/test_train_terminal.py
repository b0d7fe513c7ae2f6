"""A run outlives its terminal, its pipe and the disk under its log, or stops with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import world
from cluster.life.test_life_watch import at_step, train
from hangups import Terminal, in_terminal, onto
from train.test_train_run import records, small_data

from nlscale.checkpoint.store.store import Store

LONG = ["train.steps=100000", "checkpoint.every=90000 steps"]
LOST = "the screen could not be written ({}); the run goes on without it"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)


def checkpoint_of(folder: Path) -> int:
    """The step of the only checkpoint, which must be the last step that was taken."""
    (checkpoint,) = Store(folder / "run" / "checkpoints").checkpoints()
    assert checkpoint.step == records(folder / "run", "train")[-1]["step"]
    return checkpoint.step


def test_a_terminal_that_goes_stops_the_run_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    terminal = Terminal()

    def close(pids: list[int]) -> None:
        at_step(tmp_path / "run", 3)
        terminal.wait_for(b"loss")
        terminal.close()

    argv, begin = train(data, tmp_path, *LONG), partial(in_terminal, terminal.path, False)
    (ended,) = world.command(1, argv, tmp_path, close, before=begin)
    assert ended.code == 75
    assert checkpoint_of(tmp_path) >= 3
    assert b"loss" in terminal.shown and b"Traceback" not in terminal.shown
    assert "(SIGHUP)" in (tmp_path / "run" / "attempts.jsonl").read_text()


def test_under_nohup_the_terminal_goes_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    terminal = Terminal()

    def close(pids: list[int]) -> None:
        at_step(tmp_path / "run", 3)
        terminal.close()
        os.kill(pids[0], signal.SIGHUP)
        at_step(tmp_path / "run", len(records(tmp_path / "run", "train")) + 10)
        os.kill(pids[0], signal.SIGTERM)

    argv, begin = train(data, tmp_path, *LONG), partial(in_terminal, terminal.path, True)
    (ended,) = world.command(1, argv, tmp_path, close, before=begin)
    assert ended.code == 75
    assert checkpoint_of(tmp_path) >= 13
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count(LOST.format("Input/output error")) == 1


def test_a_reader_that_goes_and_a_full_disk_do_not_end_a_run(data: Path, tmp_path: Path) -> None:
    argv = train(data, tmp_path / "full", "train.steps=5")
    (ended,) = world.command(1, argv, tmp_path / "full", before=partial(onto, "/dev/full"))
    assert ended.code == 0
    log = (tmp_path / "full" / "run" / "train.log").read_text()
    assert log.count(LOST.format("No space left on device")) == 1 and "summary" in log

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    first: list[str] = []

    def read_one_line() -> None:
        with open(pipe) as file:
            first.append(file.readline())

    reading = threading.Thread(target=read_one_line)
    reading.start()
    argv = train(data, tmp_path / "piped", "train.steps=5")
    (ended,) = world.command(1, argv, tmp_path / "piped", before=partial(onto, str(pipe)))
    reading.join()
    assert ended.code == 0 and first[0].startswith("run run: 5 steps")
    run = tmp_path / "piped" / "run"
    assert (run / "train.log").read_text().count(LOST.format("Broken pipe")) == 1
    assert (run / "summary.json").exists() and len(records(run, "train")) == 5

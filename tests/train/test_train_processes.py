"""Runs that are started from Python: they finish, stop and fail as those of the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hangups import hears_hangups
from places import stand_at
from train.test_train_run import SMALL, records, small_data

import nlscale
from nlscale.errors import TrainingFailed, UserError

LONG = ["train.steps=100000", "checkpoint.every=null", "checkpoint.steps=[90000]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank: more only wait for each other at these sizes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    return len(records(run, "train")) if (run / "metrics.jsonl").exists() else 0


def asked(data: Path, run: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"data.dir={data}", f"run.dir={run}", *overrides]


def test_ctrl_c_reaches_the_ranks_which_save_and_the_same_call_goes_on(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def press() -> None:
        wait_until(lambda: steps_of(run) >= 3)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        nlscale.start("quickstart", *asked(data, run, *LONG), ranks=2)
    pressing.join()
    begun = nlscale.read(run)
    (checkpoint,) = begun.checkpoints
    step = begun.metrics()["step"].to_pylist()[-1]
    assert checkpoint.name == f"step-{step:08d}" and not begun.finished
    shorter = [f"train.steps={step + 2}", "resume.allow=[train.steps]"]
    done = nlscale.start("quickstart", *asked(data, run, *LONG, *shorter), ranks=2)
    assert done.finished and done.summary is not None and done.summary["steps"] == step + 2
    assert done.metrics()["step"].to_pylist() == list(range(1, step + 3))
    shown = capfd.readouterr().out
    assert f"resuming from {checkpoint}" in shown and "2 ranks" in shown
    again = nlscale.start("quickstart", *asked(data, run, *LONG, *shorter), ranks=2)
    assert again == done and "has finished before" in capfd.readouterr().out


PARENT = """
import sys, nlscale
nlscale.start("quickstart", *sys.argv[1:])
"""


def test_a_run_does_not_outlive_who_waits_for_it(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = [sys.executable, "-c", PARENT, *asked(data, run, *LONG)]
    parent = subprocess.Popen(argv)
    wait_until(lambda: steps_of(run) >= 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: bool(nlscale.read(run).checkpoints))
    assert not (run / "summary.json").exists()


def test_a_program_whose_terminal_goes_waits_for_its_ranks(data: Path, tmp_path: Path) -> None:
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *asked(data, run, *LONG)],
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=hears_hangups,
    )
    wait_until(lambda: steps_of(run) >= 2)
    parent.send_signal(signal.SIGHUP)
    assert parent.wait(timeout=60) == -signal.SIGHUP
    (checkpoint,) = nlscale.read(run).checkpoints
    assert checkpoint.name == f"step-{steps_of(run):08d}"
    assert not os.listdir(temporary)


def test_what_ends_a_run_is_the_error_that_is_raised(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    diverges = ["optimizer.learning_rate=1e30", "train.max_dropped_steps=2", "train.steps=40"]
    with pytest.raises(TrainingFailed, match="2 steps in a row were dropped"):
        nlscale.start("quickstart", *asked(data, run, *diverges))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"unknown key 'train\.stps'; did you mean 'train\.steps'"):
        nlscale.start("quickstart", "train.stps=3")
    with pytest.raises(UserError, match="ranks=0"):
        nlscale.start("quickstart", ranks=0)
    with pytest.raises(UserError, match=r"--import no_such: there is no module no_such"):
        nlscale.start("quickstart", imports=["no_such"])
    stand_at(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=r"nlscale.start is for one process.*rank 1 of 2"):
        nlscale.start("quickstart")
    assert time.monotonic() - began < 5, "said before a process is begun"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_that_the_ranks_find_is_one_line(tmp_path: Path, ranks: int) -> None:
    with pytest.raises(UserError) as refused:
        nlscale.start("quickstart", *asked(tmp_path / "nothing", tmp_path / "run"), ranks=ranks)
    assert type(refused.value) is UserError
    assert str(refused.value).startswith(f"no data at {tmp_path / 'nothing'}")
    assert "\n" not in str(refused.value)

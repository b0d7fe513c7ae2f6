"""torchrun whose terminal goes, with and without nohup; what it leaves in the temporary folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hangups import hears_hangups, ignores_hangups
from train.test_train_run import records, small_data

from nlscale.checkpoint.store.store import Store

SMALL = ["model.layers=1", "model.d_model=32", "model.heads=1", "data.sequence_length=32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


def begin(data: Path, folder: Path, start: Callable[[], None]) -> subprocess.Popen[str]:
    """The script that a person reads and copies, until some steps are taken."""
    run, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    script = ["bash", "launch/torchrun/one-node.sh", "recipes/quickstart.yaml", f"run.dir={run}"]
    script += [f"data.dir={data}", "train.steps=100000", "checkpoint.every=90000 steps", *SMALL]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    torchrun = subprocess.Popen(
        script,
        env={**os.environ, "PATH": path, "RANKS": "1", "TMPDIR": str(temporary)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=start,
    )
    wait_for(torchrun, run, 5)
    return torchrun


def wait_for(torchrun: subprocess.Popen[str], run: Path, step: int) -> None:
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(records(run, "train")) < step:
        assert time.monotonic() < end and torchrun.poll() is None
        time.sleep(0.05)


def test_a_hangup_of_torchrun_stops_the_run_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    torchrun = begin(data, tmp_path, hears_hangups)
    torchrun.send_signal(signal.SIGHUP)
    output = torchrun.communicate(timeout=120)[0]
    (checkpoint,) = Store(tmp_path / "run" / "checkpoints").checkpoints()
    assert checkpoint.step == len(records(tmp_path / "run", "train"))
    assert "SIGHUP: stopping after this step" in output
    assert not os.listdir(tmp_path / "tmp")


def test_under_nohup_torchrun_and_its_ranks_go_on(data: Path, tmp_path: Path) -> None:
    torchrun, run = begin(data, tmp_path, ignores_hangups), tmp_path / "run"
    for pid in [torchrun.pid, *children(torchrun.pid)]:
        os.kill(pid, signal.SIGHUP)
    wait_for(torchrun, run, len(records(run, "train")) + 10)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.communicate(timeout=120)
    (checkpoint,) = Store(run / "checkpoints").checkpoints()
    assert checkpoint.step >= 15
    assert not os.listdir(tmp_path / "tmp")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

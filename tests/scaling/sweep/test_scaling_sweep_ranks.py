"""Runs of a sweep over several ranks: the same runs, whole, lost, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from scaling.sweep.test_scaling_sweep_runs import PATIENCE, started, sweep_ends
from scaling.sweeps import make_data, start, write_sweep
from train.test_train_run import records

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store
from nlscale.errors import LostRank, Stopped, TrainingFailed, UserError
from nlscale.scaling.sweep.local import worker_places
from nlscale.scaling.sweep.ranks import ranks_of
from nlscale.verify.resume import family

__all__ = ["started"]  # a fixture

STEPS = 80
AXES = {"run.seed": [1, 2]}
KEYS = {
    "train.steps": STEPS,
    "train.micro_batch": 4,
    "parallel.ranks_per_node": 1,
    "checkpoint.pending": "exact",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sweep_ends(write_sweep(folder, data, AXES, set=KEYS, ranks=2, workers=1)) == 0
    return folder


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"runs/{n}/summary.json").read_text()) for n in ("seed1", "seed2")]


def bytes_sent(folder: Path) -> float:
    sent: float = records(folder / "runs/seed1", "train")[-1]["bytes_sent"]
    return sent


def until_saved(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait for a checkpoint of that step or later."""
    ends = time.monotonic() + PATIENCE
    while not any(int(path.name[5:]) >= step for path in run.glob("checkpoints/step-*[0-9]")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, f"the sweep did not get that far in {PATIENCE:g} s"
        time.sleep(0.02)


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """Pid of that rank of the run under way."""
    # forked in the order of the ranks by the process of the run, which leads their session
    runs = [pid for pid in family(process.pid) if os.getsid(pid) == pid != process.pid]
    ranks = [pid for pid in family(process.pid) if os.getsid(pid) in runs and pid not in runs]
    return sorted(ranks)[rank]


def test_two_ranks_are_two_nodes_and_give_what_one_gives(
    data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    alone = write_sweep(tmp_path, data, AXES, set=KEYS)
    assert sweep_ends(alone) == 0
    for two, one in zip(summaries(undisturbed), summaries(tmp_path), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["initial_loss"] == pytest.approx(one["initial_loss"], rel=1e-6)
    assert bytes_sent(undisturbed) > 0 == bytes_sent(tmp_path)


def test_lost_and_stopped_it_goes_on_to_the_same_results(
    data: Path, tmp_path: Path, undisturbed: Path, started: list[Any]
) -> None:
    sweep = write_sweep(tmp_path, data, AXES, set=KEYS, ranks=2, workers=1)
    started.append(process := start(sweep))
    until_saved(process, tmp_path / "runs/seed1", 8)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    until_saved(process, tmp_path / "runs/seed2", 8)  # the sweep goes on with the other
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == Stopped.exit_code, said
    log = (tmp_path / "runs/seed1/output.log").read_text()
    assert "lost rank 1" in log and "Traceback" not in log
    assert "with a checkpoint" in (tmp_path / "runs/seed2/output.log").read_text()
    assert sweep_ends(sweep) == 0
    for ours, theirs in zip(summaries(tmp_path), summaries(undisturbed), strict=True):
        assert ours["final_val_loss"] == theirs["final_val_loss"]
    for run in ("seed1", "seed2"):
        ends = [
            Store(folder / "runs" / run / "checkpoints").checkpoints()[-1]
            for folder in (tmp_path, undisturbed)
        ]
        assert compare(*ends)["bitwise"]


def fails_with(codes: dict[str, int]) -> int:
    def work() -> None:
        code = codes[os.environ["RANK"]]
        os.kill(os.getpid(), -code) if code < 0 else os._exit(code)

    return ranks_of(len(codes), work)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({"0": 0, "1": 0}, 0),
        ({"0": Stopped.exit_code, "1": Stopped.exit_code}, Stopped.exit_code),
        ({"0": Stopped.exit_code, "1": TrainingFailed.exit_code}, TrainingFailed.exit_code),
        ({"0": 0, "1": -signal.SIGKILL, "2": 0}, LostRank.exit_code),
    ],
)
def test_the_first_failure_is_the_exit_code(codes: dict[str, int], code: int) -> None:
    assert fails_with(codes) == code


def test_each_rank_has_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert worker_places(None, 2) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert worker_places(1, 4) == [{"OMP_NUM_THREADS": "2"}]
    assert worker_places(None, 16) == [{"OMP_NUM_THREADS": "1"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    places = worker_places(None, 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["4,5", "6,7"]


def test_slurm_takes_runs_of_one_rank(data: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, data, AXES, set=KEYS, ranks=2)
    args = ["--executor", "slurm", "--cluster", "recipes/clusters/test.yaml"]
    assert sweep_ends(sweep, *args) == UserError.exit_code

"""The short programs of examples/, run as their docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from generate.workplace import workplace
from train.test_train_run import SMALL

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("place"))


def program(name: str, place: Path, *arguments: str) -> tuple[int, str, str]:
    argv = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(argv, cwd=place, env=environment, capture_output=True)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def test_a_run_continues_a_text(place: Path) -> None:
    code, out, err = program("continue_text.py", place)
    assert code == 0, err
    assert out.startswith("def read(path):\n    ") and len(out) > 60
    code, other, err = program("continue_text.py", place, "runs/other", "level ")
    assert code == 0 and other.startswith("level "), err


def test_runs_are_compared_by_step(place: Path) -> None:
    code, out, err = program("compare_runs.py", place, "runs/quickstart", "runs/other")
    assert code == 0, err
    head, *rows, mixers = (line.split("\t") for line in out.splitlines())
    assert head == ["step", "quickstart", "other"] and mixers == ["mixer", "hope", "gated-delta"]
    assert [row[0] for row in rows] == ["0", "4", "8", "9"]
    losses = [[float(loss) for loss in row[1:]] for row in rows]
    assert losses[0][0] > losses[-1][0] and losses[0][1] > losses[-1][1]


def test_a_short_run_prints_its_summary_or_why_there_is_none(place: Path) -> None:
    code, out, err = program("short_run.py", place, *SMALL)
    assert code == 0, err
    assert "level2                       3 updates" in out and "final_val_loss" in out
    assert (place / "runs" / "short" / "summary.json").exists()
    code, _, err = program("short_run.py", place, "train.stepps=3")
    assert code == 1 and err.startswith("not trained: unknown key 'train.stepps'")

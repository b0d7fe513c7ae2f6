"""Whether Slurm builds a data folder: only jobs that have ended are taken for ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.corpora import lines

from nlscale.cluster.launch.data_build import running
from nlscale.data.build import begun
from nlscale.errors import UserError


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that jobs 12 and 13 build, where squeue answers as `squeue` says."""
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two"]))
    begun([str(tmp_path / "a.jsonl")], "bytes", tmp_path / "out")
    (tmp_path / "out" / "slurm").mkdir()
    (tmp_path / "out" / "slurm" / "jobs.json").write_text(json.dumps(["12", "13"]))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "out"


def answers(out: Path, stdout: str, stderr: str, code: int) -> None:
    """Let squeue say so."""
    squeue = out.parent / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '{stdout}'\nprintf '{stderr}' >&2\nexit {code}\n")
    squeue.chmod(0o755)


@pytest.mark.parametrize(
    ("stderr", "code"),
    [("", 0), ("slurm_load_jobs error: Invalid job id specified\\n", 1)],
)
def test_jobs_that_have_ended(out: Path, stderr: str, code: int) -> None:
    answers(out, "", stderr, code)
    assert running(out) is None


def test_jobs_that_run(out: Path) -> None:
    answers(out, "13\\n", "", 0)
    assert "is being built by Slurm jobs 12,13" in str(running(out))


@pytest.mark.parametrize(
    ("stderr", "code", "says"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller\\n", 1, "Unable to contact"),
        ("", 127, "exit code 127"),
    ],
)
def test_a_squeue_that_fails_has_told_nothing(out: Path, stderr: str, code: int, says: str) -> None:
    answers(out, "", stderr, code)
    with pytest.raises(UserError, match=f"squeue cannot tell whether they run: .*{says}") as caught:
        running(out)
    assert "\n" not in str(caught.value) and "jobs.json" in str(caught.value)

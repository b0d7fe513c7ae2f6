"""Running sweeps on this machine: once each, stopped, killed, failing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scaling.sweeps import WSD, finished_runs, make_data, start, write_sweep

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store
from nlscale.cli import main
from nlscale.cluster.life.owner import newest
from nlscale.scaling.sweep.local import _stop_signals
from nlscale.verify.resume import family

STEPS = [16, 32, 96]
AXES = {"model.mixer": ["hope", "attention"], "train.steps": STEPS}
PATIENCE = 120.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing happened to."""
    sweep = write_sweep(tmp_path_factory.mktemp("undisturbed"), data, AXES, set=WSD)
    assert sweep_ends(sweep) == 0
    return sweep.parent


def sweep_ends(sweep: Path, *arguments: str) -> int:
    """Exit code of `nlscale sweep`, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(sweep), *arguments])
    return int(ended.value.code or 0)


def half_way(process: subprocess.Popen[str], sweep: Path) -> None:
    """Wait until runs have finished and the first of the longest has saved its first checkpoint."""
    ends = time.monotonic() + PATIENCE
    longest = sweep.parent / "runs"
    while not any(longest.glob(f"*-steps{STEPS[-1]}/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, f"the sweep did not get that far in {PATIENCE:g} s"
        time.sleep(0.02)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Sweeps that end with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for pid in family(process.pid) if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def assert_same(sweep: Path, undisturbed: Path) -> None:
    """Every run ended as in the sweep that nothing happened to, bit for bit."""
    names = finished_runs(undisturbed / "sweep.yaml")
    assert finished_runs(sweep) == names and len(names) == 6
    for name in names:
        ours, theirs = (folder / "runs" / name for folder in (sweep.parent, undisturbed))
        first, second = (json.loads((run / "summary.json").read_text()) for run in (ours, theirs))
        for key in ("final_val_loss", "final_train_loss", "initial_loss", "tokens", "steps"):
            assert first[key] == second[key], (name, key)
        ends = [Store(run / "checkpoints").checkpoints()[-1] for run in (ours, theirs)]
        assert compare(*ends)["bitwise"], name


def test_a_second_time_nothing_is_run(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path for path in undisturbed.rglob("*") if not path.name.startswith(".owner")]
    before = {path: path.stat().st_mtime_ns for path in files}
    capsys.readouterr()
    assert sweep_ends(undisturbed / "sweep.yaml", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in plain["runs"]] == ["finished"] * 6 and plain["failed"] == {}
    assert all(run["estimated_hours"] > 0 for run in plain["runs"]), "they have been measured"
    assert sweep_ends(undisturbed / "sweep.yaml") == 0
    assert "All have finished" in capsys.readouterr().out
    losses = {run["name"]: run["val_loss"] for run in plain["runs"]}
    assert losses["hope-steps96"] < losses["hope-steps16"] < 5.6
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_each_run_has_a_folder_with_its_recipe_and_log(undisturbed: Path) -> None:
    for name in finished_runs(undisturbed / "sweep.yaml"):
        run = undisturbed / "runs" / name
        assert "validation loss" in (run / "output.log").read_text()
        assert (run / "recipe.yaml").exists() and (run / "loss.png").exists()


def test_a_longer_length_added_later_begins_from_what_is_there(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    axes = AXES | {"train.steps": [*STEPS, 100]}
    sweep = write_sweep(tmp_path, data, axes, set=WSD)
    assert sweep_ends(sweep, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    (added,) = (run for run in plain["runs"] if run["name"] == "hope-steps100")
    assert (added["begins_from"], added["begins_at_step"]) == ("hope-steps96", 72)
    log = (tmp_path / "runs" / "hope-steps100" / "output.log").read_text()
    assert "runs/hope-steps96/checkpoints/step-00000072" in log
    metrics = (tmp_path / "runs" / "hope-steps96" / "metrics.jsonl").read_text()
    assert metrics == (undisturbed / "runs" / "hope-steps96" / "metrics.jsonl").read_text()


def test_another_run_in_a_folder_is_refused_before_anything_starts(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = WSD | {"optimizer.learning_rate": 0.5}
    sweep = write_sweep(tmp_path, data, AXES, set=more, dir=str(undisturbed / "runs"))
    assert sweep_ends(sweep) == 2
    said = capsys.readouterr().err
    assert "holds another run" in said and "optimizer.learning_rate 0.001 -> 0.5" in said


def test_a_failing_run_is_listed_with_its_reason_and_the_others_finish(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {
        "rate": {"good": {"run.seed": 1}, "bad": {"optimizer.learning_rate": 1e30}},
        "train.steps": [40, 80],
    }
    more = WSD | {"train.max_dropped_steps": 3, "levels": [1]}
    sweep = write_sweep(tmp_path, data, axes, set=more)
    assert sweep_ends(sweep, "--json") == 3
    out, said = capsys.readouterr()
    assert finished_runs(sweep) == {"good-steps40", "good-steps80"}
    plain = json.loads(out)
    assert plain["failed"].keys() == {"bad-steps40", "bad-steps80"}
    assert "3 steps in a row were dropped" in plain["failed"]["bad-steps40"]
    assert "bad-steps40, from which it begins" in plain["failed"]["bad-steps80"]
    assert "2 of 4 runs failed" in said and "failed: bad-steps40: 3 steps in a row" in said


def test_ctrl_c_saves_what_is_under_way_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, undisturbed: Path, started: list[Any]
) -> None:
    sweep = write_sweep(tmp_path, data, AXES, set=WSD)
    started.append(process := start(sweep))
    half_way(process, sweep)
    pids = family(process.pid)
    os.kill(process.pid, signal.SIGINT)
    out, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert "SIGINT: waiting for" in out
    assert "of 6 runs have finished; the same command goes on" in said
    wait_until_gone(pids)
    assert len(finished_runs(sweep)) < 6
    logs = [path.read_text() for path in (tmp_path / "runs").glob("*/output.log")]
    assert any("with a checkpoint" in log for log in logs)
    assert sweep_ends(sweep) == 0
    assert_same(sweep, undisturbed)


def test_a_lost_terminal_stops_a_sweep_as_sigterm_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with _stop_signals() as came:
            os.kill(os.getpid(), signal.SIGHUP)
        assert came == ["SIGHUP"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with _stop_signals() as came:
            os.kill(os.getpid(), signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("killed", ["the sweep and its runs", "the sweep alone"])
def test_killed_half_way_it_goes_on_to_the_same_results(
    data: Path, tmp_path: Path, undisturbed: Path, started: list[Any], killed: str
) -> None:
    sweep = write_sweep(tmp_path, data, AXES, set=WSD)
    started.append(process := start(sweep))
    half_way(process, sweep)
    pids = family(process.pid)
    for pid in pids if killed == "the sweep and its runs" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    before = finished_runs(sweep)
    assert 1 <= len(before) < 6
    kept = {name: (tmp_path / "runs" / name / "summary.json").stat() for name in before}
    assert sweep_ends(sweep) == 0
    assert_same(sweep, undisturbed)
    for name, stat in kept.items():
        now = (tmp_path / "runs" / name / "summary.json").stat()
        assert now.st_mtime_ns == stat.st_mtime_ns, "a finished run is not run again"
    wait_until_gone(pids)


def test_two_sweeps_do_not_run_in_one_folder(
    data: Path, tmp_path: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path, data, AXES, set=WSD)
    started.append(process := start(sweep))
    ends = time.monotonic() + PATIENCE
    while not newest(tmp_path / "runs") and time.monotonic() < ends:
        time.sleep(0.05)
    assert sweep_ends(sweep) == 2
    said = capsys.readouterr().err
    assert f"runs is held by nlscale sweep, process {process.pid} on" in said
    assert "give the sweep another dir" in said
    assert process.poll() is None


def submitted(sweep: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the file that an array is submitted with, to an sbatch that only says yes."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "sbatch").write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/arguments\necho 7\n"
    )
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    cluster = folder / "cluster.yaml"
    cluster.write_text(
        "{name: mine, nodes: 2, gpus_per_node: 4, inter_node_gbit: 400, gpu_memory_gib: 80}"
    )
    assert sweep_ends(sweep, "--executor", "slurm", "--cluster", str(cluster)) == 0
    file = Path((folder / "arguments").read_text().splitlines()[-1])
    assert file.parent == (sweep.parent / "runs").resolve()
    assert file.read_text() == (file.parent / "commands.txt").read_text()
    return file.read_text().splitlines()


def test_slurm_gets_a_line_a_job_and_what_depends_is_in_one(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = write_sweep(tmp_path, data, {"run.seed": [1, 2], "train.steps": [8, 16]}, set=WSD)
    lines = submitted(sweep, tmp_path, monkeypatch)
    assert "2 tasks" in capsys.readouterr().out
    assert len(lines) == 2 and not finished_runs(sweep)
    first, second = lines[0].split(" && ")
    assert shlex.split(first)[:4] == ["python", "-m", "nlscale", "train"]
    assert shlex.split(first)[4].endswith("runs/seed1-steps8/recipe.yaml")
    assert shlex.split(second)[4].endswith("runs/seed1-steps16/recipe.yaml")
    path_of_setup = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path_of_setup, "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-c", lines[0]], check=True, capture_output=True, env=environment)
    assert finished_runs(sweep) == {"seed1-steps8", "seed1-steps16"}
    lines = submitted(sweep, tmp_path, monkeypatch)
    assert len(lines) == 1 and "seed2" in lines[0], "only what is still to do"


def test_slurm_needs_to_know_the_machines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path, data, {"run.seed": [1]})
    assert sweep_ends(sweep, "--executor", "slurm") == 2
    assert "--cluster YAML" in capsys.readouterr().err


def wait_until_gone(pids: list[int]) -> None:
    """Processes end a moment after what they belong to; none may stay."""
    ends = time.monotonic() + PATIENCE
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < ends, "a process outlived its sweep"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

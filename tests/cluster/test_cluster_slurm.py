"""Runs under a real Slurm of two nodes: warned, requeued, killed, and the same run all the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import world
from cluster.slurm import Slurm
from scaling.sweeps import write_sweep
from train.test_train_run import records, small_data

from nlscale import cli
from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store

pytestmark = pytest.mark.root

RECIPE, CLUSTER = "recipes/quickstart.yaml", "recipes/clusters/test.yaml"
NLSCALE = [sys.executable, "-m", "nlscale"]
NAP = "tests.cluster.nap"
# The jobs wait after each step, so that they last; what they are compared with need not.
AFTER_EACH_STEP = [f"run.imports=[{NAP}]", "evaluate=[nap]", "train.validate_every=1"]
# What is asked of a job does not depend on its size; a small one leaves the machine to others.
SMALL = [
    "model.layers=1", "model.d_model=32", "model.heads=1", "data.sequence_length=32",
    "train.global_batch=4", "train.micro_batch=1", "train.validation_sequences=8",
]  # fmt: skip
LONG = ["train.steps=300", *SMALL]
# A canonical checkpoint sums the pending windows a little earlier: a difference in rounding, which
# training at the recipe's learning rate amplifies tenfold in a dozen steps.
SHORT = ["train.steps=24", "optimizer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


def keys(data: Path, folder: Path, pending: str) -> list[str]:
    return [
        "checkpoint.every=10 steps",
        f"data.dir={data}",
        f"run.dir={folder}",
        f"checkpoint.pending={pending}",
    ]


def a_rank_a_node(folder: Path) -> Path:
    """The cluster with half its ranks, for what does not depend on how many there are."""
    text = Path(CLUSTER).read_text()
    assert "gpus_per_node: 2" in text
    path = folder / "cluster.yaml"
    path.write_text(text.replace("gpus_per_node: 2", "gpus_per_node: 1"))
    return path


def launch(slurm: Slurm, overrides: list[str], cluster: str | Path = CLUSTER) -> str:
    """Submit the recipe; the number of the job."""
    command = [*NLSCALE, "launch", "slurm", RECIPE, "--cluster", str(cluster), *overrides]
    out = slurm.run(*command)
    assert "submitted job " in out
    return out.split("submitted job ")[1].split(":")[0]


def begun(run: Path) -> int:
    """How many attempts have begun to train."""
    path = run / "attempts.jsonl"
    events = path.read_text().splitlines() if path.exists() else []
    return sum('"begin"' in event for event in events)


def last_step(run: Path) -> int:
    found = records(run, "train") if (run / "metrics.jsonl").exists() else []
    return found[-1]["step"] if found else 0


def until(slurm: Slurm, job: str, condition: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for a condition; the job is what a failure tells of."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            state = slurm.state(job)
            log = Path(state["StdOut"]).read_text()[-1500:]
            raise AssertionError(f"{state['JobState']} {state['Reason']}\n{log}")
        time.sleep(0.1)


def ranks_of(run: Path) -> list[int]:
    """Pids of the ranks of a run, by rank."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            if f"run.dir={run}".encode() not in command or not command[0].endswith(b"python"):
                continue
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in environment:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def undisturbed(overrides: list[str], folder: Path, per_node: int) -> None:
    ranks, command = 2 * per_node, ["train", RECIPE, *overrides]
    ended = world.command(ranks, command, folder, ranks_per_node=per_node, timeout=300)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].output


def test_a_job_that_is_requeued_killed_and_warned_is_the_run_that_never_was(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "exact", tmp_path / "default"
    # Two jobs side by side: the second is only told to stop once, in the middle of a window. The
    # first, whose ranks are started four times, has one on each node.
    cluster = a_rank_a_node(tmp_path)
    job = launch(slurm, [*LONG, *AFTER_EACH_STEP, *keys(data, run, "exact")], cluster)
    second = launch(slurm, [*SHORT, *keys(data, other, "canonical")])

    until(slurm, job, lambda: last_step(run) >= 5)
    slurm.run("scontrol", "requeue", job)
    until(slurm, second, lambda: last_step(other) >= 4)
    slurm.run("scancel", "--signal=HUP", second)  # as where a terminal goes

    until(slurm, job, lambda: begun(run) == 2 and last_step(run) >= 25)
    killed_at = time.monotonic()
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    log = run / f"slurm-{job}.log"
    until(slurm, job, lambda: "lost rank 1" in log.read_text(), 30)
    assert time.monotonic() - killed_at < 15
    until(slurm, job, lambda: begun(run) == 3 and last_step(run) >= 45)

    # the time limit comes near: Slurm gives the warning that the script asks for
    used = slurm.state(job)["RunTime"].split(":")
    minutes = 60 * int(used[0]) + int(used[1]) + 2
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    slurm.wait_pending(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert slurm.wait(second)["JobState"] == "COMPLETED"
    assert begun(other) == 2
    assert slurm.wait(job)["JobState"] == "COMPLETED"

    text = log.read_text()
    assert text.count("with a checkpoint; the same command goes on from it") == 2
    assert "(SIGTERM)" in text and ("(SIGUSR1)" in text or "(the job ends)" in text)
    assert text.count("is requeued") == 2, "Slurm itself did the first"
    assert text.count("resuming from ") == 3
    assert "Traceback" not in text

    for folder, pending, steps, per_node in (
        (run, "exact", LONG, 1),
        (other, "canonical", SHORT, 2),
    ):
        whole = tmp_path / f"{pending}-whole"
        undisturbed([*steps, *keys(data, whole, pending)], tmp_path / f"{pending}-ranks", per_node)
        here, there = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
        assert here["tokens"] == there["tokens"]
        if pending == "exact":
            assert here["final_val_loss"] == there["final_val_loss"]
            newest = [Store(f / "checkpoints").checkpoints()[-1] for f in (folder, whole)]
            assert compare(*newest)["bitwise"]
        else:
            assert here["final_val_loss"] == pytest.approx(there["final_val_loss"], rel=1e-6)
    spent = json.loads((run / "summary.json").read_text())["goodput"]
    assert sum(v for k, v in spent.items() if k != "wall_seconds") == pytest.approx(1, abs=0.02)
    assert 0 < spent["training"] < 0.9 and spent["down"] > 0 and spent["redone"] > 0


def test_a_run_stops_in_time_for_all_that_a_save_does(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    """Slurm warns too late; the run knows when its job ends, and what is slow here."""
    run, cluster = tmp_path / "run", a_rank_a_node(tmp_path)
    text = cluster.read_text().replace("00:10:00", "00:02:00")
    cluster.write_text(text.replace("warn_seconds: 100", "warn_seconds: 1"))
    overrides = [*LONG, *keys(data, run, "exact"), "checkpoint.every=4 steps"]
    overrides += ["run.imports=[tests.cluster.slow_disk]", "evaluate=[nap]"]
    job = launch(slurm, [*overrides, "train.validate_every=1"], cluster)
    until(slurm, job, lambda: begun(run) == 1)
    ends = datetime.fromisoformat(slurm.state(job)["EndTime"]).timestamp()
    # Slurm may warn a minute earlier than it was asked to. It has more time; the run does not know.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    log = run / f"slurm-{job}.log"
    until(slurm, job, lambda: "is requeued" in log.read_text(), 180)
    ended = time.time()
    slurm.run("scancel", job)
    said = log.read_text()
    assert "(the job ends)" in said
    assert "with a checkpoint; the same command goes on from it" in said
    assert "Traceback" not in said
    # A save here takes 15 seconds and more, of which writing is not one.
    assert ends - 90 < ended < ends - 20
    newest = Store(run / "checkpoints").checkpoints()[-1]
    newest.verify()
    assert newest.step == last_step(run)


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    """One start gets to no checkpoint; with no restart allowed a second is refused."""
    run, cluster = tmp_path / "run", a_rank_a_node(tmp_path)
    overrides = [
        *LONG,
        *AFTER_EACH_STEP,
        *keys(data, run, "canonical"),
        "checkpoint.every=1000 steps",
        "run.max_restarts=0",
    ]
    job = launch(slurm, overrides, cluster)
    until(slurm, job, lambda: last_step(run) >= 2)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    state = slurm.wait(job)
    assert state["JobState"] == "FAILED" and state["ExitCode"].startswith("4:"), state
    log = (run / f"slurm-{job}.log").read_text()
    assert f"was started 1 time by Slurm job {job} without getting to a checkpoint" in log
    assert "It last ended: lost rank 1" in log


def test_an_array_runs_the_points_of_a_sweep(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, data, {"run.seed": [1, 2, 3]})
    sweep = [*NLSCALE, "sweep", str(path), "--executor", "slurm", "--cluster", CLUSTER]
    out = slurm.run(*sweep)
    job = out.split("submitted array ")[1].split(":")[0]
    end = time.monotonic() + 240
    while slurm.run("squeue", "--noheader", "--job", job, check=False):
        assert time.monotonic() < end, slurm.run("squeue")
        time.sleep(0.5)
    found = sorted((tmp_path / "runs").rglob("summary.json"))
    assert len(found) == 3
    assert len({json.loads(summary.read_text())["final_val_loss"] for summary in found}) == 3
    again = slurm.run(*sweep)
    assert "submitted" not in again, "there is nothing left to do"


def test_tasks_build_the_data_that_one_process_builds(slurm: Slurm, tmp_path: Path) -> None:
    """Two arrays and what is done once between and after them, cancelled and submitted again."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        text = f"text {i}, " * 100_000
        (tmp_path / "in" / f"{i}.jsonl").write_text(json.dumps({"text": text}) + "\n" * 2)
    asked = ["--source", str(tmp_path / "in"), "--tokenizer", "bytes", "--unit-mib", "1"]
    build = [*NLSCALE, "data", "build", *asked, "--duplicates=drop", "--held-out=0.3"]
    tasks = ["--executor", "slurm", "--cluster", CLUSTER, "--tasks", "2"]
    out = tmp_path / "tasks"
    said = slurm.run(*build, "--out", str(out), *tasks)
    jobs = re.findall(r"submitted array (\d+)", said)
    assert len(jobs) == 4
    slurm.run("scancel", *jobs)
    for job in jobs:
        slurm.wait(job)
    said = slurm.run(*build, "--out", str(out), *tasks)
    jobs = re.findall(r"submitted array (\d+)", said)
    assert len(jobs) == 4
    busy = slurm.run(*build, "--out", str(out), *tasks)
    assert "is being built by Slurm jobs" in busy and "submitted" not in busy
    ended = [slurm.wait(job)["JobState"] for job in jobs]
    logs = "\n".join(path.read_text() for path in (out / "slurm").glob("*.log"))
    assert ended == ["COMPLETED"] * 4, logs
    slurm.run(*build, "--out", str(tmp_path / "one"))
    index = (out / "index.json").read_bytes()
    assert index == (tmp_path / "one" / "index.json").read_bytes()
    assert len(json.loads(index)["splits"]["train"]["shards"]) > 1
    for shard in (tmp_path / "one").glob("*.tar"):
        assert shard.read_bytes() == (out / shard.name).read_bytes()
    again = slurm.run(*build, "--out", str(out), *tasks)
    assert "submitted" not in again and "documents" in again


def test_a_mistake_is_refused_before_anything_is_submitted(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    command = [*NLSCALE, "launch", "slurm", RECIPE, "--cluster", CLUSTER]
    command += [f"run.dir={tmp_path}", f"data.dir={data}"]
    before = slurm.run("squeue", "--noheader", "--format=%i")
    for wrong, says in (
        ("data.dir=nowhere", "no data at nowhere; build it with"),
        ("parallel.tensor=8", "parallel.tensor"),
        ("model.hidden=4000000", "GiB"),
    ):
        done = subprocess.run(
            [*command, wrong], env=slurm.environment, capture_output=True, text=True
        )
        assert done.returncode == 2 and says in done.stderr, done.stderr
    assert slurm.run("squeue", "--noheader", "--format=%i") == before


def test_without_slurm_the_script_is_printed_or_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["launch", "slurm", RECIPE, "--cluster", CLUSTER, f"data.dir={data}"]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    assert "sbatch not found" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--dry-run"])
    assert ended.value.code == 0
    assert "#SBATCH --ntasks-per-node=2" in capsys.readouterr().out

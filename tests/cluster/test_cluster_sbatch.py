"""What a real Slurm makes of the scripts: names, paths and options are what was meant."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.slurm import Slurm

from nlscale.cluster.launch.batch import array_script, job_script
from nlscale.cluster.launch.limits import seconds
from nlscale.cluster.launch.slurm import submit, submit_array
from nlscale.cluster.machines import Cluster, Launch
from nlscale.cluster.machines import Slurm as Options
from nlscale.errors import UserError

pytestmark = pytest.mark.root

NAMES = [
    "a b", "try #1", "50%a-%j-%%x", "it's \"so\"", "$(touch X)`touch X`", "a hetjob", "ä日本🙂",
    "a;b&c|d<e>f", "--wrap=x", "=a:b,c*?[d]{e,f}~!", " leading", "trailing ", "x" * 200,
]  # fmt: skip
NOTE = 'mkdir -p "$NOTES"; printf \'%s\\0\' "$@" > "$NOTES/words"; env -0 > "$NOTES/seen"'
STOPS = """\
trap 'sleep 1; echo saved > "$NOTES/saved"; exit 75' TERM
touch "$NOTES/began"
while :; do sleep 0.1; done"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as running:
        yield running


@pytest.fixture(autouse=True)
def of_the_tests(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


def machines(setup: str, notes: Path, **options: object) -> Cluster:
    slurm = Options(gpus=False, time="00:10:00", **options)  # type: ignore[arg-type]
    variables = {"NOTES": str(notes), "VALUE": f"{notes.name}\n#SBATCH --nodes=9"}
    launch = Launch(setup=setup, environment=variables, slurm=slurm)
    return Cluster("here", 1, 1, 1.0, 1.0, None, launch)


def python(folder: Path, does: str) -> str:
    """A `launch.setup` that finds a Python that only does that."""
    folder.mkdir()
    (folder / "python").write_text(f"#!/usr/bin/env bash\n{does}\n")
    (folder / "python").chmod(0o755)
    return f"export PATH={shlex.quote(str(folder))}:$PATH"


def fields(slurm: Slurm, job: str) -> dict[str, str]:
    """Fields that stand on a line of their own, and may hold anything."""
    lines = slurm.run("scontrol", "show", "job", job).splitlines()
    found = dict(line.lstrip(" ").split("=", 1) for line in lines if "=" in line)
    return found | {"JobName": lines[0].split(" JobName=", 1)[1]}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_slurm_reads_back_what_was_meant(slurm: Slurm, tmp_path: Path) -> None:
    setup = python(tmp_path / "a 'bin' #1", NOTE)
    jobs = {}
    for name in NAMES:
        run = tmp_path / "runs" / name
        cluster = machines(setup, run / "notes", options=[f"--comment={shlex.quote(name)}"])
        script = job_script("r.yaml", [f"run.dir={run}", "a\nb"], cluster, name, run)
        jobs[name] = submit(script, run / "job.sbatch", [])
    for name, job in jobs.items():
        run = tmp_path / "runs" / name
        assert slurm.wait(job, 60)["JobState"] == "COMPLETED", name
        found = fields(slurm, job)
        assert found["JobName"] == name
        assert found["Comment"] == f"{name} ", "scontrol writes one space more"
        assert found["WorkDir"] == str(Path.cwd())
        log = run / f"slurm-{job}.log"
        assert log.read_text().endswith("exit code 0\n"), sorted(run.iterdir())
        words = (run / "notes" / "words").read_text().split("\0")
        assert words[3:-1] == ["r.yaml", f"run.dir={run}", "a\nb"]
        assert "VALUE=notes\n#SBATCH --nodes=9\0" in (run / "notes" / "seen").read_text()
    assert not list(tmp_path.rglob("X"))


def test_a_setup_that_fails_ends_a_job_that_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    cluster = machines("echo no such module >&2; exit 75", tmp_path / "notes")
    commands = tmp_path / "commands.txt"
    commands.write_text("python\n")
    scripts = {
        "job": (job_script("r.yaml", [], cluster, "setup", tmp_path), []),
        "array": (array_script(cluster, "setup", 1, tmp_path), [str(commands)]),
    }
    for kind, (script, arguments) in scripts.items():
        job = submit(script, tmp_path / f"{kind}.sbatch", arguments)
        state = slurm.wait(job, 60)
        assert state["JobState"] == "FAILED" and state["ExitCode"] == "2:0", state
        assert state["Restarts"] == "0"
        log = Path(state["StdOut"].replace("%A", job).replace("%a", "1")).read_text()
        assert "no such module" in log and "launch.setup failed on " in log


def test_a_task_that_is_told_to_stop_may_save(slurm: Slurm, tmp_path: Path) -> None:
    """The shell around a command must not end before it, or Slurm kills what is left."""
    notes = tmp_path / "notes"
    notes.mkdir()
    cluster = machines(python(tmp_path / "bin", STOPS), notes)
    (tmp_path / "commands.txt").write_text("python && python\n")
    script = array_script(cluster, "stops", 1, tmp_path)
    job = submit(script, tmp_path / "array.sbatch", [str(tmp_path / "commands.txt")])
    until((notes / "began").exists)
    slurm.run("scancel", "--signal=TERM", f"{job}_1")
    until((notes / "saved").exists)
    log = tmp_path / f"slurm-{job}-1.log"
    until(lambda: "exit code 75: task 1 is requeued" in log.read_text())
    slurm.run("scancel", job)


def test_times_are_what_slurm_takes_them_for(slurm: Slurm, tmp_path: Path) -> None:
    for text in ("9", "9:30", "0:09:30", "0-1", "0-0:9", "1-2:3:4", "90:00:00", "unlimited"):
        cluster = machines("true", tmp_path, options=["--hold"], warn_seconds=100)
        cluster.launch.slurm.time = text
        script = job_script("r", [], cluster, "time", tmp_path)
        job = submit(script, tmp_path / "job.sbatch", [])
        limit = slurm.state(job)["TimeLimit"]
        slurm.run("scancel", job)
        meant = seconds(text)
        if meant is None:
            assert limit == "UNLIMITED"
            continue
        days, _, hours = limit.rpartition("-")
        h, m, s = map(int, hours.split(":"))
        assert ((int(days or 0) * 24 + h) * 60 + m) * 60 + s == -(-meant // 60) * 60, text


def test_a_sweep_of_more_tasks_than_an_array_may_have(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "commands.txt").write_text("true\n" * 1500)
    cluster = machines("true", tmp_path, options=["--hold"])
    submit_array(tmp_path / "commands.txt", cluster, "large")
    said = capsys.readouterr().out
    assert "1000 tasks of" in said and "500 tasks of" in said
    listed = slurm.run("squeue", "--noheader", "--array", "--format=%F %K", "--name=large")
    assert len(listed.splitlines()) == 1500
    slurm.run("scancel", "--name=large")


def test_what_slurm_refuses_is_one_line(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = machines("true", tmp_path)
    cluster.launch.slurm.partition = "no#such"
    script = job_script("r", [], cluster, "x", tmp_path)
    with pytest.raises(UserError, match="invalid partition specified: no#such") as refused:
        submit(script, tmp_path / "run" / "job.sbatch", [])
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
    (tmp_path / "slurm.conf").write_text("no controller\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(UserError, match="sbatch refuses") as refused:
        submit(script, tmp_path / "run" / "job.sbatch", [])
    assert "\n" not in str(refused.value)

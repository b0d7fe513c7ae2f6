"""What sbatch is given, what it says, and what stays behind where it refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from cluster.launch.stubs import Stubs

from nlscale.cluster.launch.batch import job_script
from nlscale.cluster.launch.slurm import check_array, submit, submit_array
from nlscale.cluster.machines import Cluster, Launch, Slurm
from nlscale.errors import UserError

MACHINES = Cluster("big", 1, 1, 1.0, 1.0, None, Launch(slurm=Slurm(partition="gpu")))
SCRIPT = job_script("r", [], MACHINES, "a b", Path("/runs/x"))


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    made = Stubs(tmp_path / "stubs")
    for name in [n for n in os.environ if n.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name in ("PATH", "NOTES"):
        monkeypatch.setenv(name, made.variables[name])
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder"


def commands(folder: Path, lines: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "commands.txt"
    path.write_text("".join(f"echo 'a\u2028b' {n}\n" for n in range(lines)), encoding="utf-8")
    return path


def test_a_script_is_submitted_where_it_lies(stubs: Stubs, folder: Path) -> None:
    assert submit(SCRIPT, folder / "job.sbatch", ["a b"]) == "7"
    assert (folder / "job.sbatch").read_text() == SCRIPT
    assert stubs.words("sbatch") == [
        "--parsable", f"--chdir={Path.cwd()}", str(folder / "job.sbatch"), "a b",
    ]  # fmt: skip


@pytest.mark.parametrize("before", [None, "the script of a job that waits"])
def test_where_sbatch_refuses_nothing_changes(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setenv("REFUSES", "1")
    path = folder / "job.sbatch"
    if before:
        folder.mkdir(parents=True)
        path.write_text(before)
    with pytest.raises(UserError) as refused:
        submit(SCRIPT, path, [])
    assert str(refused.value) == (
        f"sbatch refuses {path}: sbatch: error: QOSMaxSubmitJobPerUserLimit sbatch: error: Job "
        f"violates policy"
    )
    if before:
        assert path.read_text() == before
    else:
        assert not folder.parent.exists()


@pytest.mark.parametrize("number", ["", "Submitted"])
def test_an_sbatch_that_names_no_job_is_not_believed(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setenv("NUMBER", number)
    with pytest.raises(UserError, match="does not say which job"):
        submit(SCRIPT, folder / "job.sbatch", [])


def test_what_sbatch_warns_of_is_passed_on(
    stubs: Stubs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WARNING", "sbatch: lua: account changed to x")
    monkeypatch.setenv("NUMBER", "12;elsewhere")
    assert submit(SCRIPT, folder / "job.sbatch", []) == "12"
    assert capsys.readouterr().err == "sbatch: lua: account changed to x\n"


def test_variables_do_not_overrule_the_script(
    stubs: Stubs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {
        "SBATCH_JOB_NAME": "x", "SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "5",
        "SBATCH_NO_REQUEUE": "1", "SBATCH_ACCOUNT": "mine", "SBATCH_QOS": "long",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    submit(SCRIPT, folder / "job.sbatch", [])
    seen = stubs.environment("sbatch-environment")
    left = {name for name in seen if name.startswith("SBATCH")}
    assert left == {"SBATCH_ACCOUNT", "SBATCH_QOS"}, "of which the script says nothing"
    said = capsys.readouterr().err
    assert "SBATCH_PARTITION=debug is not heeded: the script says --partition\n" in said
    assert said.count("is not heeded") == 4


def test_a_job_begun_from_a_job_has_nothing_of_it(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    submit(SCRIPT, folder / "job.sbatch", [])
    assert "SLURM_MEM_PER_CPU" in stubs.environment("sbatch-environment"), "a person's own"
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    submit(SCRIPT, folder / "job.sbatch", [])
    seen = stubs.environment("sbatch-environment")
    assert {n for n in seen if n.startswith("SLURM")} == {"SLURM_CONF"}


@pytest.mark.parametrize("what", ["a file for a folder", "a folder for a file"])
def test_what_cannot_be_written_is_one_line(stubs: Stubs, tmp_path: Path, what: str) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "run" / "job.sbatch").mkdir(parents=True)
    path = tmp_path / ("taken" if what.startswith("a file") else "run") / "job.sbatch"
    with pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}"):
        submit(SCRIPT, path, [])
    assert (tmp_path / "taken").read_text() == "mine" and not stubs.words("sbatch")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("MaxArraySize = 4", [3, 3, 1]),
        ("MaxArraySize            = 1001", [7]),
        ("SchedulerParameters = x,max_array_tasks=5,y\nMaxArraySize = 50001", [5, 2]),
        ("", [7]),
    ],
)
def test_a_sweep_is_as_many_arrays_as_slurm_wants(
    stubs: Stubs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
    sizes: list[int],
) -> None:
    monkeypatch.setenv("CONFIG", config)
    path = commands(folder, 7)
    submit_array(path, MACHINES, "sweep")
    files = [Path(word) for word in stubs.words("sbatch") if word.endswith(".txt")]
    assert [file.name for file in files] == [f"array-{n}.txt" for n in range(1, len(sizes) + 1)]
    assert "".join(file.read_text(encoding="utf-8") for file in files) == path.read_text(
        encoding="utf-8"
    )
    for file, size in zip(files, sizes, strict=True):
        assert f"#SBATCH --array=1-{size}%8\n" in file.with_suffix(".sbatch").read_text()
    assert capsys.readouterr().out.count("submitted array 7: ") == len(sizes)


def test_a_later_submission_leaves_the_commands_of_an_earlier_one(
    stubs: Stubs, folder: Path
) -> None:
    submit_array(commands(folder, 3), MACHINES, "sweep")
    earlier = (folder / "array-1.txt").read_text(encoding="utf-8")
    submit_array(commands(folder, 1), MACHINES, "sweep")
    assert (folder / "array-1.txt").read_text(encoding="utf-8") == earlier
    assert (folder / "array-2.txt").read_text(encoding="utf-8").count("\n") == 1


def test_an_array_that_is_refused_names_those_before_it(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIG", "MaxArraySize = 3")
    monkeypatch.setenv("REFUSES", "2")
    with pytest.raises(UserError, match=r"QOSMax.*; arrays submitted before it: 7; scancel them"):
        submit_array(commands(folder, 5), MACHINES, "sweep")
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["array-1.sbatch", "array-1.txt", "commands.txt"]


def test_a_slurm_without_arrays_is_named(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIG", "MaxArraySize = 0")
    with pytest.raises(UserError, match="takes no job arrays"):
        submit_array(commands(folder, 2), MACHINES, "sweep")


def test_a_sweep_is_checked_before_it_writes(
    stubs: Stubs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds a newline"):
        check_array(MACHINES, "a\nb", folder)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match="sbatch not found"):
        check_array(MACHINES, "sweep", folder)

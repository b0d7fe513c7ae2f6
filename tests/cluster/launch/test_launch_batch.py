"""The batch scripts, run with stubs for Slurm: values arrive as they were, and ends mean what they
should."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster.launch.stubs import Stubs
from cluster.launch.test_launch_quote import HOSTILE

from nlscale.cluster.launch.batch import array_script, job_script
from nlscale.cluster.machines import Cluster, Launch, Slurm
from nlscale.errors import UserError

ENDS, SECONDS = "2031-01-02T03:04:05", "1925089445"


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


def cluster(slurm: dict[str, Any] | None = None, **launch: Any) -> Cluster:
    return Cluster("big", 2, 4, 100.0, 80.0, 989.0, Launch(slurm=Slurm(**(slurm or {})), **launch))


def job(machines: Cluster, overrides: list[str] | None = None, name: str = "job") -> str:
    return job_script("r.yaml", overrides or [], machines, name, Path("/runs/x"))


def array(machines: Cluster) -> str:
    return array_script(machines, "sweep", 3, Path("/runs/x"))


TASK = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.fixture
def commands(tmp_path: Path) -> str:
    path = tmp_path / "commands 'of' #1.txt"
    path.write_text("python one\npython two 'a b' && python three $'x\\ny'\npython four\n")
    return str(path)


def test_a_rank_is_given_what_was_meant_whatever_it_holds(stubs: Stubs) -> None:
    texts = [text for text in HOSTILE if "\r" not in text]
    variables = {f"VALUE_{i}": text for i, text in enumerate(texts)}
    machines = cluster(setup=stubs.setup, environment=variables, interface="ib0")
    done = stubs.run(job(machines, [f"run.dir={text}" for text in texts]), CODE="3")
    assert done.returncode == 3, done.stderr
    said = ["-m", "nlscale", "train", "r.yaml", *(f"run.dir={text}" for text in texts)]
    assert stubs.words("arguments") == said
    seen = stubs.environment()
    assert {name: seen[name] for name in variables} == variables
    assert seen["NCCL_SOCKET_IFNAME"] == seen["GLOO_SOCKET_IFNAME"] == "ib0"
    assert [seen[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
        "0", "8", "0", "4",
    ]  # fmt: skip
    assert seen["MASTER_ADDR"] == "192.0.2.7" and seen["MASTER_PORT"] == "24242"
    assert not (stubs.folder / "X").exists()


def test_a_task_runs_its_line(stubs: Stubs, commands: str) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "9", "NLSCALE_JOB_END": "1"}
    script = array(cluster(setup=stubs.setup, environment={"A": "b c\n#d"}))
    done = stubs.run(script, commands, **TASK, **values)
    assert done.returncode == 0, done.stderr
    assert stubs.words("arguments") == ["three", "x\ny"], "after `two`"
    seen = stubs.environment()
    assert seen["A"] == "b c\n#d"
    assert not {"RANK", "WORLD_SIZE", "NLSCALE_JOB_END"} & seen.keys(), "of another job"


@pytest.mark.parametrize("task", ["4", ""])
def test_a_task_without_a_line_says_so(stubs: Stubs, commands: str, task: str) -> None:
    script = array(cluster(setup=stubs.setup))
    done = stubs.run(script, commands, **{**TASK, "SLURM_ARRAY_TASK_ID": task})
    assert done.returncode == 2
    assert ("has no line 4" if task else "usage: sbatch --array=1-N") in done.stderr


def test_setup_is_run_by_the_rank_in_its_container(stubs: Stubs, commands: str) -> None:
    slurm = {"container": "/images/it's a #1.sqsh", "mounts": "/a b:/c"}
    machines = cluster(slurm, setup=stubs.setup)
    for script, arguments in ((job(machines), []), (array(machines), [commands])):
        assert stubs.run(script, *arguments, **TASK).returncode == 0
    options = [
        "--container-image=/images/it's a #1.sqsh",
        f"--container-workdir={Path.cwd()}",
        "--container-mounts=/a b:/c",
    ]
    assert stubs.words("srun") == [
        *("--kill-on-bad-exit=0", "--wait=0", *options),
        *("--ntasks=1", *options),
    ]
    assert (stubs.notes / "setups").read_text() == "setup\n" * 2, "once a rank, not on the way"


def test_a_container_brings_its_own_python() -> None:
    assert "setup=:\n" in job(cluster({"container": "image"}))
    assert "export PATH=" in job(cluster())


@pytest.mark.parametrize(
    "setup",
    ["false", "exit 75", "exit 0", "(exit 137)", "no-such-command-here", "kill -9 $BASHPID; true",
     "module() { return 5; }; module load x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["job", "array"])
def test_a_setup_that_fails_ends_the_job_for_good(
    stubs: Stubs, commands: str, setup: str, kind: str
) -> None:
    machines = cluster(setup=f"{setup}")
    script, arguments = (job(machines), []) if kind == "job" else (array(machines), [commands])
    done = stubs.run(script, *arguments, **TASK)
    assert not (stubs.notes / "arguments").exists(), "Python is not started"
    if "kill" in setup:  # a shell that is killed has no last words: the node may be at fault
        assert done.returncode == 137
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"launch.setup failed on \S+ with exit code \d+", done.stderr)
    assert "launch.setup failed, see above" in done.stdout
    assert not (stubs.notes / "requeued").exists()


def test_a_setup_does_not_disturb_the_arguments(stubs: Stubs) -> None:
    """Scripts that are sourced see the arguments of the shell around them."""
    setup = f'{stubs.setup}; set -- a b; nounset=$undefined; [ "$#" -eq 2 ]'
    assert stubs.run(job(cluster(setup=setup), ["train.steps=3"])).returncode == 0
    assert stubs.words("arguments")[-2:] == ["r.yaml", "train.steps=3"]


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, ""), (1, ""), (2, ""), (3, ""), (4, ""), (5, "job"), (75, "both"), (127, ""), (130, ""),
     (137, "both"), (143, "both")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["job", "array"])
def test_only_what_may_go_on_is_requeued(
    stubs: Stubs, commands: str, kind: str, code: int, requeued: str
) -> None:
    machines = cluster(setup=stubs.setup)
    script, arguments = (job(machines), []) if kind == "job" else (array(machines), [commands])
    for restarts in ("0", "100"):
        variables = {**TASK, "CODE": str(code), "SLURM_RESTART_COUNT": restarts}
        assert stubs.run(script, *arguments, **variables).returncode == code
    noted = stubs.notes / "requeued"
    number = "4242\n" if kind == "job" else "77_2\n"
    assert (noted.read_text() if noted.exists() else "") == (
        number if requeued in (kind, "both") else ""
    ), "once, and never for ever"


@pytest.mark.parametrize(
    ("ends", "known"),
    [(f"{ENDS}\\n", True), ("", False), ("\\n", False), ("N/A\\n", False), ("NONE\\n", False),
     ("Unknown\\n", False), (f"{ENDS}\\n{ENDS}\\n", False), ("UNLIMITED\\n", False),
     ("tomorrow\\n", False), ("12:00\\n", False), ("2031-13-45T99:99:99\\n", False)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["job", "array"])
def test_the_end_of_a_job_is_known_or_not_guessed(
    stubs: Stubs, commands: str, kind: str, ends: str, known: bool
) -> None:
    """`date -d ''` is this morning: a run told that would stop at once, again and again."""
    machines = cluster(setup=stubs.setup)
    script, arguments = (job(machines), []) if kind == "job" else (array(machines), [commands])
    odd = {"TZ": "America/New_York", "SLURM_TIME_FORMAT": "relative", "NLSCALE_JOB_END": "12"}
    done = stubs.run(script, *arguments, **TASK, **odd, ENDS=ends)
    assert done.returncode == 0, done.stderr
    found = stubs.environment().get("NLSCALE_JOB_END")
    assert found == (SECONDS if known else None)
    asked = (stubs.notes / "squeue").read_text()
    assert asked.startswith("UTC standard ") and asked.endswith(
        f"--jobs {'4242' if kind == 'job' else '77_2'} --format %e\n"
    )


def test_a_rank_is_not_started_where_nobody_knows_the_meeting_point(stubs: Stubs) -> None:
    (stubs.bin / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = stubs.run(job(cluster(setup=stubs.setup)))
    assert done.returncode == 1 and "does not say the address" in done.stderr
    assert not (stubs.notes / "arguments").exists()


SAID_ELSEWHERE = [
    "--time=1:00", "--tim=1:00", "-t 5", "-t5", "--partition gpu", "-pgpu", "--account=x", "-A x",
    "--output=x", "-o x", "--job-name=x", "--nodes=3", "-N3", "--ntasks=4", "--array=1-3",
    "--signal=B:TERM", "--no-requeue", "--open-mode=truncate", "--chdir=/x", "--exclusive -t 5",
    "--wait", "--test-only", "--wrap=x", "--help",
]  # fmt: skip


@pytest.mark.parametrize(
    ("machines", "says"),
    [
        *((cluster({"options": [option]}), "launch.slurm.options") for option in SAID_ELSEWHERE),
        (cluster({"options": ["--comment='a"]}), "no closing quotation"),
        (cluster({"options": ["--comment=a b"]}), "'b' is not an option of sbatch"),
        (cluster({"options": [""]}), "is empty"),
        (cluster({"options": ["exclusive"]}), "'exclusive' is not an option"),
        (cluster({"options": ["--qos=a\n#SBATCH --nodes=9"]}), "holds a newline"),
        (cluster({"account": "lab\n#SBATCH --nodes=9"}), "launch.slurm.account"),
        (cluster({"account": "my lab"}), "launch.slurm.account 'my lab' holds a space"),
        (cluster({"account": "lab\x01"}), "launch.slurm.account"),
        (cluster({"partition": "a\tb"}), "launch.slurm.partition"),
        (cluster({"time": "1:00:00\n"}), "is not a time limit"),
        (cluster({"time": "00:05:00"}), "warn_seconds 300 leaves nothing"),
        (cluster({"container": "a\nb"}), "launch.slurm.container"),
        (cluster({"container": " "}), "launch.slurm.container is empty"),
        (cluster({"mounts": "a\x1bb", "container": "x"}), "launch.slurm.mounts"),
        (cluster(environment={"A; touch X; B": "1"}), "'A; touch X; B' is not the name of a"),
        (cluster(environment={"": "1"}), "'' is not the name"),
        (cluster(environment={"1A": "1"}), "'1A' is not the name"),
        (cluster(environment={"Ä": "1"}), "is not the name"),
        (cluster(environment={"A\n": "1"}), "is not the name"),
        (cluster(environment={"A": "a\0b"}), "launch.environment.A holds a NUL"),
        (cluster(environment={"WORLD_SIZE": "2"}), "WORLD_SIZE is what the launch finds out"),
        (cluster(environment={"MASTER_ADDR": "x"}), "MASTER_ADDR is what the launch finds out"),
        (cluster(environment={"UID": "2"}), "UID cannot be set"),
        (cluster(interface="ib0; touch X"), "launch.interface 'ib0; touch X' is not the name"),
        (cluster(interface=""), "launch.interface '' is not the name"),
        (cluster(setup="echo 'oops"), "launch.setup is not what bash understands"),
        (cluster(setup="if true"), "launch.setup is not what bash understands"),
        (cluster(setup="a\0b"), "launch.setup holds a NUL"),
    ],
)
def test_what_would_mean_something_else_is_refused(machines: Cluster, says: str) -> None:
    for script in (job, array):
        with pytest.raises(UserError, match=re.escape(says)) as refused:
            script(machines)
        assert "\n" not in str(refused.value), "one line"


@pytest.mark.parametrize(
    "name", ["", " ", "a\nb", "x" * 1025, "\udcff"], ids=lambda n: ascii(n)[:9]
)
def test_a_job_has_a_name_that_it_can_have(name: str) -> None:
    with pytest.raises(UserError, match="job"):
        job(cluster(), name=name)


def test_a_folder_that_slurm_cannot_write_its_log_to_is_refused() -> None:
    with pytest.raises(UserError, match=r"run.dir .* holds a backslash"):
        job_script("r", [], cluster(), "n", Path("/runs/a\\b"))


def test_a_mount_is_one_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a:b", "a,b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(UserError, match="cannot be mounted"):
            job(cluster({"container": "image"}))
        assert "'--container-mounts=/x'" in job(cluster({"container": "image", "mounts": "/x"}))


def test_options_are_words_as_a_shell_has_them() -> None:
    options = ["--exclusive --qos long", "--comment='a \"b\" #c'", "--mail-user=x@y.z", "-C a100"]
    lines = re.findall(r"^#SBATCH (.*)$", job(cluster({"options": options})), re.MULTILINE)
    assert lines[-5:-1] == [
        "--exclusive --qos long",
        '"--comment=a \\"b\\" #c"',
        "--mail-user=x@y.z",
        "-C a100",
    ]


def test_python_in_a_folder_that_path_cannot_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubs: Stubs
) -> None:
    monkeypatch.setattr("sys.executable", "/opt/a:b/bin/python")
    with pytest.raises(UserError, match="a folder with a colon"):
        job(cluster())
    spaced = tmp_path / "it's a #1 $(x)"
    os.rename(stubs.bin, spaced)
    monkeypatch.setattr("sys.executable", str(spaced / "python"))
    path = f"{spaced}:{os.environ['PATH']}"
    assert stubs.run(job(cluster()), PATH=path).returncode == 0
    assert stubs.environment()["PATH"].startswith(f"{spaced}:{spaced}:")


def test_scripts_with_hostile_values_pass_shellcheck(tmp_path: Path) -> None:
    variables = {f"VALUE_{i}": text for i, text in enumerate(HOSTILE)}
    slurm = {"container": "/a 'b' $c", "mounts": "/a,/b:/c", "options": ["--comment='$(x) #'"]}
    machines = cluster(slurm, environment=variables, setup="echo '$x' \"$y\"; true # 'no'")
    path = tmp_path / "script.sbatch"
    for text in (job(machines, HOSTILE), array(machines)):
        path.write_text(text)
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

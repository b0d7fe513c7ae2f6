"""The scripts in launch/: sound, and doing what `nlscale launch` says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train.test_train_run import records, small_data

from nlscale import cli
from nlscale.cluster.launch.batch import array_script, job_script
from nlscale.cluster.launch.torchrun import node_script
from nlscale.cluster.machines import Cluster, Launch, Slurm, load_cluster
from nlscale.errors import UserError

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh")) + sorted((ROOT / "launch").rglob("*.sbatch"))
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shellcheck(path: Path) -> None:
    assert shutil.which("shellcheck"), "shellcheck not found: apt-get install shellcheck"
    done = subprocess.run(
        ["shellcheck", "--external-sources", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "tests/run.sh", ROOT / ".ci/run"], ids=str)
def test_scripts_pass_shellcheck(path: Path) -> None:
    assert len(SCRIPTS) >= 6
    shellcheck(path)


def cluster(**launch: object) -> Cluster:
    return Cluster("big", 4, 8, 100.0, 80.0, 989.0, Launch(**launch))  # type: ignore[arg-type]


def test_a_job_asks_for_what_the_cluster_file_says(tmp_path: Path) -> None:
    slurm = Slurm(
        partition="gpu", account="lab", time="2-00:00:00", warn_seconds=600,
        options=["--exclusive"], container="/images/it's.sqsh", mounts="/data,/home",
    )  # fmt: skip
    launch = {"interface": "ib0", "environment": {"NCCL_DEBUG": "a b"}, "slurm": slurm}
    text = job_script("r.yaml", ["run.dir=a b"], cluster(**launch), "name", tmp_path)
    asked = re.findall(r"^#SBATCH (.*)", text, re.MULTILINE)
    assert asked == [
        "--job-name=name", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--partition=gpu", "--account=lab", "--time=2-00:00:00", "--signal=USR1@600", "--requeue",
        "--open-mode=append", "--exclusive", f"--output={tmp_path}/slurm-%j.log",
    ]  # fmt: skip
    assert text.startswith("#!/usr/bin/env bash\n")
    assert (
        "environment=('NCCL_SOCKET_IFNAME=ib0' 'GLOO_SOCKET_IFNAME=ib0' 'NCCL_DEBUG=a b')\n" in text
    )
    assert "set -- r.yaml 'run.dir=a b'\n" in text
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    shellcheck(path)
    path.write_text(array_script(cluster(**launch), "sweep", 27, tmp_path))
    assert "#SBATCH --array=1-27%8\n" in path.read_text()
    assert "#SBATCH --gpus-per-node=1\n" in path.read_text()
    shellcheck(path)


def test_nodes_have_the_python_that_launches_unless_told_otherwise(tmp_path: Path) -> None:
    scripts = {
        setup: (
            job_script("r", [], cluster(setup=setup), "n", tmp_path),
            node_script("r", [], cluster(setup=setup, hosts=["a", "b", "c", "d"]), 0),
        )
        for setup in (None, "module load nlscale")
    }
    own = f'export PATH={Path(sys.executable).parent}:"$PATH"'
    for setup, (job, node) in scripts.items():
        assert f"setup='{setup or own}'\n" in job
        assert f"setup='{setup or own}'\n" in node


def test_without_gpus_none_are_asked_for(tmp_path: Path) -> None:
    bare = cluster(slurm=Slurm(gpus=False))
    assert "gpus-per-node" not in job_script("r", [], bare, "n", tmp_path)


def test_every_node_gets_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nodes = cluster(hosts=["a", "b", "c", "d"], port=1234, interface="ib0")
    script = node_script("r.yaml", ["train.steps=3"], nodes, 2)
    assert "export RANKS=8\nexport HEAD=a:1234\nexport NODES=4\nexport NODE_RANK=2\n" in script
    path = ROOT / "launch/torchrun/many-nodes.sh"
    assert script.endswith(f"exec bash {path} r.yaml train.steps=3\n")
    assert f"\ncd {tmp_path}\n" in script, "relative paths are those of whoever launches"
    assert "NODE_RANK" not in node_script("r.yaml", [], nodes, None)
    with pytest.raises(UserError, match="has nodes 0 to 3"):
        node_script("r.yaml", [], nodes, 4)
    with pytest.raises(UserError, match="names 1 of 4 nodes"):
        node_script("r.yaml", [], cluster(hosts=["a"]), 0)
    path = tmp_path / "node.sh"
    path.write_text(script)
    shellcheck(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("launch: {slurm: {partitoin: gpu}}", "'launch.slurm.partitoin'; did you mean 'partition'"),
        ("launch: {hosts: 3}", "launch.hosts"),
        ("launch: {port: high}", "launch.port: 'high' is not a whole number"),
        ("launch: {slurm: {time: tomorrow}}", "is not a time limit"),
        ("launch: {slurm: {gpus: maybe}}", "launch.slurm.gpus: 'maybe' is not true or false"),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(tmp_path: Path, text: str, says: str) -> None:
    whole = "name: x\nnodes: 2\ngpus_per_node: 2\ninter_node_gbit: 1\ngpu_memory_gib: 4\n" + text
    (tmp_path / "c.yaml").write_text(whole)
    with pytest.raises(UserError, match=re.escape(says)):
        load_cluster(tmp_path / "c.yaml")


def test_a_dry_run_needs_no_data_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for launcher, shows in (("slurm", "#SBATCH --nodes=2"), ("torchrun", "export NODES=2")):
        with pytest.raises(SystemExit) as ended:
            cli.main(
                ["launch", launcher, "recipes/quickstart.yaml", "--dry-run",
                 "--cluster", "recipes/clusters/test.yaml", f"run.dir={tmp_path / 'run'}",
                 "data.dir=nowhere", "model.vocabulary=256"]
            )  # fmt: skip
        assert ended.value.code == 0
        assert shows in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pdsh(tmp_path: Path) -> dict[str, str]:
    """A `pdsh` that runs a command for each host here, in place of ssh, and an ssh that answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text("#!/bin/sh\necho 127.0.0.1\n")  # also to `hostname -I`
    (folder / "pdsh").write_text(
        """#!/usr/bin/env bash
while [ $# -gt 0 ]; do
    case $1 in
    -S) shift ;;
    -f) shift 2 ;;
    -w) hosts=$2; shift 2 ;;
    *) break ;;
    esac
done
node=0
for host in ${hosts//,/ }; do
    bash -c "${*//%n/$node}" & node=$((node + 1)); jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit $code
"""
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return {**ENVIRONMENT, "PATH": f"{folder}:{ENVIRONMENT['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}


def test_deepspeed_is_given_flags_that_it_has(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node-a slots=8\nnode-b slots=8\n")
    done = subprocess.run(
        ["bash", "launch/deepspeed/train.sh", str(hosts), "recipes/quickstart.yaml", "run.dir=a b"],
        env={**ENVIRONMENT, "DRY_RUN": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("--module nlscale train recipes/quickstart.yaml run.dir=a\\ b \n")
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(done.stdout.split()[1:])
    assert (parsed.hostfile, parsed.module, parsed.no_local_rank) == (str(hosts), True, True)
    missing = subprocess.run(
        ["bash", "launch/deepspeed/train.sh", "none.txt", "r.yaml"], capture_output=True, text=True
    )
    assert missing.returncode == 2 and "no hostfile at none.txt" in missing.stderr


def test_a_hostfile_starts_the_ranks_of_every_node(tmp_path: Path, pdsh: dict[str, str]) -> None:
    (tmp_path / "text").mkdir()
    data, run = small_data(tmp_path / "text", documents=8, held_out=0.2), tmp_path / "run"
    (tmp_path / "hosts.txt").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    done = subprocess.run(
        ["bash", "launch/deepspeed/train.sh", str(tmp_path / "hosts.txt"),
         "recipes/quickstart.yaml", f"data.dir={data}", f"run.dir={run}", "train.steps=3",
         "data.sequence_length=32", "levels=[1,2]"],
        env={**pdsh, "PORT": "29511"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [r["step"] for r in records(run, "train")] == [1, 2, 3]
    # two nodes of one rank: what a slow level keeps back does not cross between them
    assert records(run, "train")[-1]["bytes_saved"] > 0

"""`nlscale launch slurm`, and the job arrays of sweeps."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from nlscale.cluster.launch.script import (
    environment_of,
    exports,
    fill_in,
    read_script,
    setup_of,
)
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError

_ARRAY_AT_ONCE = 8
"""Tasks of an array that run at a time."""


def job_script(
    recipe: str, overrides: list[str], cluster: Cluster, name: str, run_dir: Path
) -> str:
    """The batch script that trains a recipe on all nodes of a cluster.

    Args:
        recipe: its path or name.
        overrides: of its keys.
        cluster: the machines.
        name: of the job.
        run_dir: the run's folder, where the job's output goes.
    """
    lines = [
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={cluster.nodes}",
        f"#SBATCH --ntasks-per-node={cluster.gpus_per_node}",
        *_common(cluster, cluster.gpus_per_node),
        f"#SBATCH --output={run_dir}/slurm-%j.log",
        *_lines_of_the_shell(cluster),
        f"set -- {shlex.join([recipe, *overrides])}",
    ]
    return fill_in(read_script("slurm/train.sbatch"), lines)


def array_script(cluster: Cluster, name: str, tasks: int, folder: Path) -> str:
    """The batch script of an array of that many tasks, each on one GPU; output goes to `folder`."""
    lines = [
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=1-{tasks}%{_ARRAY_AT_ONCE}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        *_common(cluster, 1),
        f"#SBATCH --output={folder}/slurm-%A-%a.log",
        *_lines_of_the_shell(cluster),
    ]
    return fill_in(read_script("slurm/array.sbatch"), lines)


def submit(script: str, path: Path, arguments: list[str]) -> str:
    """Write a batch script and submit it with these arguments; the number of the job.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch not found: submit from a login node of the cluster, or print the script with "
            "--dry-run and take it there"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["sbatch", "--parsable", f"--chdir={Path.cwd()}", str(path), *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def submit_array(commands: Path, cluster: Cluster, name: str, dry_run: bool) -> None:
    """Submit a job array, one task for each line of a file of shell commands.

    Args:
        commands: the file.
        cluster: the machines.
        name: of the job.
        dry_run: print the script instead.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    folder = commands.resolve().parent
    tasks = len(commands.read_text(encoding="utf-8").splitlines())
    script = array_script(cluster, name, tasks, folder)
    if dry_run:
        print(script, end="")
        return
    job = submit(script, folder / "array.sbatch", [str(commands.resolve())])
    print(f"submitted array {job}: {tasks} tasks of {commands}; squeue --job {job} shows them")


def _common(cluster: Cluster, gpus: int) -> list[str]:
    slurm = cluster.launch.slurm
    lines = [f"#SBATCH --gpus-per-node={gpus}"] if slurm.gpus else []
    lines += [f"#SBATCH --{key}={value}" for key, value in _named(cluster).items() if value]
    return [
        *lines,
        f"#SBATCH --time={slurm.time}",
        f"#SBATCH --signal=USR1@{slurm.warn_seconds}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *(f"#SBATCH {option}" for option in slurm.options),
    ]


def _named(cluster: Cluster) -> dict[str, str | None]:
    return {
        "partition": cluster.launch.slurm.partition,
        "account": cluster.launch.slurm.account,
    }


def _lines_of_the_shell(cluster: Cluster) -> list[str]:
    slurm = cluster.launch.slurm
    container = []
    if slurm.container is not None:
        container.append(f"--container-image={slurm.container}")
        container.append(f"--container-workdir={Path.cwd()}")
        container.append(f"--container-mounts={slurm.mounts or Path.cwd()}")
    return [
        "# shellcheck disable=SC2016  # evaluated on the nodes",
        f"setup={shlex.quote(setup_of(cluster))}",
        f"container=({' '.join(map(_quoted, container))})",
        *exports(environment_of(cluster)),
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"

"""The batch scripts of `nlscale launch slurm`, and of the job arrays of sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.launch.check import check_launch, check_slurm, words_of
from nlscale.cluster.launch.limits import check_warning
from nlscale.cluster.launch.quote import log_file, sbatch, shell, shell_words
from nlscale.cluster.launch.script import environment_of, fill_in, read_script, setup_of
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError

_LONGEST_NAME = 1024
"""Bytes that Slurm takes for the name of a job."""


@dataclass(frozen=True)
class Task:
    """What each task of an array asks for: a run of a sweep, unless it says something else."""

    gpus: int = 1
    cores: int = 1
    at_once: int = 8
    """Tasks that run at a time."""


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

    Raises:
        UserError: a value that cannot stand in a script, or a warning that comes at once.
    """
    asked = {
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.gpus_per_node),
    }
    lines = [
        *_directives(cluster, name, asked, cluster.gpus_per_node),
        _output(run_dir, "slurm-%j.log", "run.dir"),
        *_lines_of_the_shell(cluster),
        f"set -- {shell_words([recipe, *overrides])}",
    ]
    return fill_in(read_script("slurm/train.sbatch"), lines)


def array_script(
    cluster: Cluster, name: str, tasks: int, folder: Path, task: Task | None = None
) -> str:
    """The batch script of an array of that many tasks; output goes to `folder`.

    Args:
        cluster: the machines.
        name: of the job.
        tasks: how many.
        folder: of their output.
        task: what each asks for; None: a run of a sweep.

    Raises:
        UserError: as `job_script`.
    """
    task = task or Task()
    asked = {"array": f"1-{tasks}%{task.at_once}", "nodes": "1", "ntasks": "1"}
    if task.cores > 1:
        asked["cpus-per-task"] = str(task.cores)
    lines = [
        *_directives(cluster, name, asked, task.gpus),
        _output(folder, "slurm-%A-%a.log", "the folder of the sweep"),
        *_lines_of_the_shell(cluster),
    ]
    return fill_in(read_script("slurm/array.sbatch"), lines)


def _directives(cluster: Cluster, name: str, asked: dict[str, str], gpus: int) -> list[str]:
    """What is asked of Slurm, but for where the output goes."""
    slurm = cluster.launch.slurm
    check_slurm(slurm)
    check_warning(slurm)
    if not name.strip() or len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise UserError(
            f"a job cannot be named {name[:40]!r}: give --name, of 1 to {_LONGEST_NAME} characters"
        )
    values = {
        "job-name": name,
        **asked,
        "gpus-per-node": str(gpus) if slurm.gpus and gpus else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "signal": f"USR1@{slurm.warn_seconds}",
    }
    known = {key: value for key, value in values.items() if value}
    return [
        *(f"#SBATCH {sbatch(f'--{key}={value}', _said(key))}" for key, value in known.items()),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *(
            f"#SBATCH {' '.join(sbatch(word, 'launch.slurm.options') for word in words_of(option))}"
            for option in slurm.options
        ),
    ]


def _said(key: str) -> str:
    return "the name of the job" if key == "job-name" else f"launch.slurm.{key}"


def _output(folder: Path, pattern: str, what: str) -> str:
    return f"#SBATCH {sbatch(f'--output={log_file(str(folder), pattern, what)}', what)}"


def _lines_of_the_shell(cluster: Cluster) -> list[str]:
    check_launch(cluster)
    slurm = cluster.launch.slurm
    container = []
    if slurm.container is not None:
        container.append(f"--container-image={slurm.container}")
        container.append(f"--container-workdir={Path.cwd()}")
        container.append(f"--container-mounts={slurm.mounts or _this_folder()}")
    variables = [f"{name}={value}" for name, value in environment_of(cluster).items()]
    return [
        "# shellcheck disable=SC2016  # as it stands; the ranks evaluate it",
        f"setup={shell(setup_of(cluster, slurm.container is not None))}",
        f"environment=({shell_words(variables, bare=False)})",
        f"container=({shell_words(container, bare=False)})",
    ]


def _this_folder() -> str:
    """The folder of the launch, to mount at the same place.

    Raises:
        UserError: its name means something in a list of mounts.
    """
    folder = str(Path.cwd())
    if ":" in folder or "," in folder:
        raise UserError(
            f"{folder!r} cannot be mounted in a container, its name holds a colon or a comma; set "
            f"launch.slurm.mounts, or launch from another folder"
        )
    return folder

"""`nlscale data build --executor slurm`: arrays for the passes of a build, each after the other.

    survey (tasks)  ->  settle (one)  ->  tokens (tasks)  ->  finish (one)

All are submitted at once. Where one fails, Slurm cancels those after it, and the same command
submits what is left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from nlscale.cluster.launch.batch import Task
from nlscale.cluster.launch.quote import shell_words
from nlscale.cluster.launch.slurm import check_array, submit_array
from nlscale.cluster.machines import Cluster
from nlscale.data.building.share import SHARED, progress_of, steps_left
from nlscale.data.building.work import Work
from nlscale.data.index import UNITS_NAME, write_json
from nlscale.errors import UserError

_UNKNOWN = "invalid job id"
"""What squeue says of jobs that have ended: slurm_strerror(ESLURM_INVALID_JOB_ID)."""
_FOLDER, _JOBS = "slurm", "jobs.json"
"""Of scripts and logs, in the data folder; and what of Slurm builds it."""


def submit_build(work: Work, cluster: Cluster, tasks: int, workers: int) -> None:
    """Submit what is left of a build.

    Args:
        work: what is to be built.
        cluster: the machines; their GPUs are not asked for.
        tasks: of each array, at most; each does its share of the units.
        workers: processes, and cores, of each task.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    folder = work.out.resolve() / _FOLDER
    name = f"data-{work.out.resolve().name}"
    check_array(cluster, name, folder)
    asked = Task(gpus=0, cores=workers, at_once=tasks)
    jobs: list[str] = []
    after: list[str] = []
    try:
        folder.mkdir(exist_ok=True)
        for step in steps_left(work):
            of = min(tasks, len(work.plan.units)) if step in SHARED else 1
            commands = folder / f"{step}.txt"
            lines = [_command(work.out, step, task, of, workers) for task in range(1, of + 1)]
            commands.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            after = submit_array(commands, cluster, f"{name}-{step}", asked, after)
            jobs += after
            write_json(folder / _JOBS, jobs)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def running(out: Path) -> str | None:
    """What of Slurm builds a folder now, in a line; None: nothing does.

    Raises:
        UserError: that cannot be told here.
    """
    path = out / _FOLDER / _JOBS
    if not path.exists() or not (out / UNITS_NAME).exists():
        return None
    jobs = ",".join(json.loads(path.read_bytes()))
    if shutil.which("squeue") is None:
        raise UserError(
            f"{out} is built by Slurm jobs {jobs}, and there is no squeue here to ask; go on where "
            f"there is, or remove {path} if they have ended"
        )
    asked = ["squeue", "--noheader", f"--jobs={jobs}", "--format=%i"]
    said = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    # Of a job that has ended for some minutes squeue knows nothing, and fails.
    if said.returncode and _UNKNOWN not in said.stderr.lower():
        why = " ".join(said.stderr.split()) or f"exit code {said.returncode}"
        raise UserError(
            f"{out} is built by Slurm jobs {jobs}, and squeue cannot tell whether they run: {why}; "
            f"give the command again when it can, or remove {path} if they have ended"
        )
    if not said.stdout.strip():
        return None
    return (
        f"{out} is being built by Slurm jobs {jobs}: {progress_of(out)}; `squeue --jobs={jobs}` "
        f"shows them, `scancel {jobs.replace(',', ' ')}` stops them"
    )


def _command(out: Path, step: str, task: int, of: int, workers: int) -> str:
    share = [f"--task={task}", f"--of={of}", f"--workers={workers}"]
    return shell_words(["python", "-m", "nlscale", "data", "share", str(out), step, *share])

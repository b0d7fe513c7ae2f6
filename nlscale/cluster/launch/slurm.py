"""`nlscale launch slurm`: handing scripts to sbatch, a job or the arrays of a sweep."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nlscale.cluster.launch.batch import Task, array_script
from nlscale.cluster.launch.script import write_script
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError

_USUAL_LIMITS = {"MaxArraySize": 1001, "max_array_tasks": sys.maxsize}
"""Of arrays, where Slurm's administrators have not set them; an index is below MaxArraySize."""
_PATIENCE_SECONDS = 30
_OVERRULES = {
    "SBATCH_JOB_NAME": "job-name",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_NO_REQUEUE": "requeue",
    "SBATCH_OPEN_MODE": "open-mode",
    "SBATCH_OUTPUT": "output",
}
"""Variables that sbatch heeds more than its script, and the option that they overrule."""
_OTHERS = ("SBATCH_WAIT", "SBATCH_TEST_ONLY")
"""Variables that would keep a job from being submitted and left to itself."""
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Slurm's variables that do not speak of the job in which the launch itself may run."""


def submit(script: str, path: Path, arguments: list[str], after: Sequence[str] = ()) -> str:
    """Write a batch script and submit it with these arguments; the number of the job.

    It waits until the jobs `after` have ended well; where one has not, Slurm cancels it.

    Where it is refused nothing stays behind, and a script that was there before is there again.

    Raises:
        UserError: there is no sbatch here, it refuses, or the script cannot be written.
    """
    _require_sbatch()
    with _undone_on_failure(path):
        write_script(script, path)
        options = ["--parsable", f"--chdir={Path.cwd()}"]
        if after:
            options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        done = subprocess.run(
            ["sbatch", *options, str(path), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(script),
        )
        said = " ".join(done.stderr.split())
        number = done.stdout.strip().partition(";")[0]
        if done.returncode:
            raise UserError(f"sbatch refuses {path}: {said or f'exit code {done.returncode}'}")
        if not number.isdigit():
            raise UserError(f"sbatch does not say which job {path} is: {done.stdout!r} {said}")
    if said:
        print(said, file=sys.stderr)
    return number


def check_array(cluster: Cluster, name: str, folder: Path) -> None:
    """Refuse what `submit_array` would, before anything is written.

    Raises:
        UserError: there is no sbatch here, or a value cannot stand in a script.
    """
    _require_sbatch()
    array_script(cluster, name, 1, folder)


def submit_array(
    commands: Path,
    cluster: Cluster,
    name: str,
    task: Task | None = None,
    after: Sequence[str] = (),
) -> list[str]:
    """Submit a file of shell commands, one task for each line; the numbers of the arrays.

    More lines than an array may have become several arrays. Each has a script and a file of
    commands of its own, `array-N.sbatch` and `array-N.txt` beside the file: tasks read it when they
    begin, maybe days later, so no later submission may change it.

    Args:
        commands: the file.
        cluster: the machines.
        name: of the job.
        task: what each task asks for; None: a run of a sweep.
        after: jobs that must have ended well before.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    folder = commands.resolve().parent
    lines = commands.read_text(encoding="utf-8").split("\n")[:-1]
    most = _largest_array()
    sent: list[str] = []
    for first in range(0, len(lines), most):
        part = lines[first : first + most]
        script = array_script(cluster, name, len(part), folder, task)
        path = _new_file(folder, "".join(f"{line}\n" for line in part))
        try:
            sent.append(submit(script, path.with_suffix(".sbatch"), [str(path)], after))
        except UserError as error:
            path.unlink(missing_ok=True)
            if not sent:
                raise
            raise UserError(
                f"{error}; arrays submitted before it: {', '.join(sent)}; scancel them, or give "
                f"the same command again when they have ended"
            ) from None
        tasks = f"{len(part)} task{'s' * (len(part) > 1)} of {path}"
        print(f"submitted array {sent[-1]}: {tasks}; squeue --job {sent[-1]} shows them")
    return sent


def _require_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch not found: submit from a login node of the cluster, or print the script with "
            "--dry-run and take it there"
        )


def _largest_array() -> int:
    """Tasks that an array may have, numbered from 1.

    Raises:
        UserError: this Slurm has no arrays.
    """
    limits = dict(_USUAL_LIMITS)
    if shutil.which("scontrol") is not None:
        with suppress(subprocess.TimeoutExpired):  # sbatch will say what is wrong
            said = subprocess.run(
                ["scontrol", "show", "config"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_SECONDS,
            ).stdout
            found = re.findall(r"\b(MaxArraySize|max_array_tasks)\s*=\s*([0-9]+)", said)
            limits |= {limit: int(number) for limit, number in found}
    most = min(limits["MaxArraySize"] - 1, limits["max_array_tasks"])
    if most < 1:
        raise UserError(
            "this Slurm takes no job arrays (MaxArraySize of `scontrol show config`): give "
            "--executor local, in a job of its own"
        )
    return most


def _new_file(folder: Path, text: str) -> Path:
    """Write `array-N.txt`, with the first number that is free.

    Raises:
        UserError: that cannot be done.
    """
    number = 1
    while True:
        path = folder / f"array-{number}.txt"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _environment(script: str) -> dict[str, str]:
    """This process' variables, but for those that would overrule the script, which is said."""
    kept = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    for name in [name for name in kept if name.startswith("SBATCH_") and name not in _OVERRULES]:
        option = name.removeprefix("SBATCH_").lower().replace("_", "-")
        if re.search(rf"^#SBATCH .*--{option}(=|\b)", script, re.MULTILINE):
            print(f"{name} is not heeded: the script says --{option}", file=sys.stderr)
            del kept[name]
    for name, option in _OVERRULES.items():
        if name in kept and re.search(rf'^#SBATCH "?--{option}(=|$)', script, re.MULTILINE):
            value = kept.pop(name)
            print(f"{name}={value} is not heeded: the script says --{option}", file=sys.stderr)
    if "SLURM_JOB_ID" in kept:  # launched from within a job: what that one has is not meant
        kept = {n: v for n, v in kept.items() if not _of_a_job(n)}
    return kept


def _of_a_job(name: str) -> bool:
    return name.startswith("SLURM_") and name not in _OF_THE_CLUSTER


@contextmanager
def _undone_on_failure(path: Path) -> Iterator[None]:
    """Put a file, and the folders that it needs, back as they were where what is inside fails."""
    before = path.read_bytes() if os.path.isfile(path) else None
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what failed is said anyway
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
            for folder in missing:
                folder.rmdir()
        raise

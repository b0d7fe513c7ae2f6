"""What a cluster file may put into a script: names that are names, options that are options."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

from nlscale.cluster.launch.quote import refuse_control
from nlscale.cluster.machines import Cluster, Launch, Slurm
from nlscale.errors import UserError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTERFACE = re.compile(r"[\^=]{0,2}[A-Za-z0-9_.:@-]+(,[A-Za-z0-9_.:@-]+)*")
_HOST = re.compile(r"\[?[A-Za-z0-9_:](?:[A-Za-z0-9_.:%-]*[A-Za-z0-9_.:])?\]?")
_FOUND_OUT = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "NLSCALE_JOB_END", "HEAD", "NODES", "NODE_RANK", "RANKS"),
    *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
}
"""Variables by which the scripts tell a rank its place; a second truth would break the run."""
_OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
"""Variables that bash does not let anyone set."""

_SAID_BY = {
    "job-name": "--name",
    "nodes": "nodes",
    "ntasks": "nodes and gpus_per_node",
    "tasks": "nodes and gpus_per_node",
    "ntasks-per-node": "gpus_per_node",
    "tasks-per-node": "gpus_per_node",
    "partition": "launch.slurm.partition",
    "account": "launch.slurm.account",
    "time": "launch.slurm.time",
    "signal": "launch.slurm.warn_seconds",
    "output": "run.dir",
    "chdir": "the folder of the launch",
    **dict.fromkeys(("array", "requeue", "no-requeue", "open-mode"), "the script"),
    **dict.fromkeys(("wrap", "parsable", "wait", "test-only", "help", "usage", "version"), ""),
}
"""Options of sbatch that the script has already, and what says them; empty: with these nothing
would be submitted, or not as it must be."""
_SHORT = {
    "J": "job-name", "N": "nodes", "n": "ntasks", "p": "partition", "A": "account", "t": "time",
    "o": "output", "D": "chdir", "a": "array", "W": "wait", "h": "help", "V": "version",
}  # fmt: skip


def check_launch(cluster: Cluster) -> None:
    """Refuse what would mean something else in a shell.

    Raises:
        UserError: a name in `launch.environment` that is none, or that the scripts set themselves;
            an interface that is none; a `launch.setup` that bash cannot read.
    """
    launch = cluster.launch
    for name in launch.environment:
        _check_variable(name)
    for name, value in launch.environment.items():
        if "\0" in value:
            raise UserError(f"launch.environment.{name} holds a NUL character; leave it out")
    if launch.interface is not None and not _INTERFACE.fullmatch(launch.interface):
        raise UserError(
            f"launch.interface {launch.interface!r} is not the name of a network interface; write "
            f"one such as ib0, or several as ib0,ib1"
        )
    _check_setup(launch)


def check_slurm(slurm: Slurm) -> None:
    """Refuse what cannot be a value of an option of Slurm's.

    Raises:
        UserError: which key, and why.
    """
    for key in ("partition", "account"):
        value = getattr(slurm, key)
        if value is not None and re.search(r"\s", value):
            raise UserError(
                f"launch.slurm.{key} {value!r} holds a space or a newline, as no {key} does; "
                f"further options of sbatch go into launch.slurm.options"
            )
    for key in ("container", "mounts"):
        value = getattr(slurm, key)
        if value is not None:
            refuse_control(value, f"launch.slurm.{key}")
            if not value.strip():
                raise UserError(f"launch.slurm.{key} is empty; write null if there is none")


def check_hosts(launch: Launch) -> None:
    """Refuse what cannot be a host.

    Raises:
        UserError: which.
    """
    for host in launch.hosts:
        if not _HOST.fullmatch(host):
            raise UserError(
                f"launch.hosts: {host!r} is neither the name nor the address of a host; write one "
                f"such as node-a, without user or port"
            )


def words_of(option: str) -> list[str]:
    """The words of one of `launch.slurm.options`, without their quotes.

    Raises:
        UserError: it is no option of sbatch, or one that is said elsewhere.
    """
    what = f"launch.slurm.options {option!r}"
    refuse_control(option, "launch.slurm.options")
    try:
        words = shlex.split(option)
    except ValueError as error:
        raise UserError(f"{what}: {str(error).lower()}; close it") from None
    if not words:
        raise UserError(f"{what} is empty; leave it out")
    takes_value = False
    for word in words:
        if re.fullmatch(r"--?[A-Za-z].*", word):
            _refuse_said(word, what)
        elif not takes_value:
            raise UserError(
                f"{what}: {word!r} is not an option of sbatch; write --name=value, with quotes "
                f"around a value that holds spaces"
            )
        takes_value = word.startswith("-") and "=" not in word
    return words


def _refuse_said(word: str, what: str) -> None:
    """Refuse an option that the script has already, also one that is cut short, as sbatch does."""
    name = word.lstrip("-").partition("=")[0]
    if word.startswith("--"):
        full = next((long for long in _SAID_BY if long.startswith(name)), None)
    else:
        full = _SHORT.get(name[0])
    if full is None:
        return
    if said := _SAID_BY[full]:
        raise UserError(f"{what}: --{full} follows from {said}; say it there")
    raise UserError(f"{what}: with --{full} no job would be submitted as it must be; leave it out")


def _check_variable(name: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise UserError(
            f"launch.environment: {name!r} is not the name of a variable; it is made of letters, "
            f"digits and _, and does not begin with a digit"
        )
    if name in _FOUND_OUT:
        raise UserError(
            f"launch.environment: {name} is what the launch finds out itself; leave it out"
        )
    if name in _OF_BASH:
        raise UserError(f"launch.environment: {name} cannot be set, it is bash's own; leave it out")


def _check_setup(launch: Launch) -> None:
    if launch.setup is None:
        return
    if "\0" in launch.setup:
        raise UserError("launch.setup holds a NUL character; leave it out")
    bash = shutil.which("bash")
    if bash is None:
        return  # a script may be printed here that is run elsewhere
    done = subprocess.run(
        [bash, "-n"], input=launch.setup.encode(errors="surrogateescape"), capture_output=True
    )
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise UserError(f"launch.setup is not what bash understands: {said}")

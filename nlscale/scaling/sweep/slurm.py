"""Running a sweep as an array of Slurm jobs: one shell command a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nlscale.cluster.launch.quote import shell_words
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.scaling.sweep.local import RECIPE_FILE
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.spec import Sweep
from nlscale.scaling.sweep.status import Status

COMMANDS_FILE = "commands.txt"


def write_commands(sweep: Sweep, runs: list[Run], states: Mapping[str, Status]) -> Path:
    """Write the recipes of the runs that have not finished, and one command line for each job.

    A run that has finished meanwhile, when its line is run again, says so and ends well.

    Raises:
        UserError: the folder of the sweep cannot be written.
    """
    out = sweep.folder / COMMANDS_FILE
    try:
        for run in _unfinished(runs, states):
            run.folder.mkdir(parents=True, exist_ok=True)
            recipe.write(run.config, run.folder / RECIPE_FILE, imports=True)
        lines = command_lines(runs, states)
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None
    return out


def command_lines(runs: list[Run], states: Mapping[str, Status]) -> list[str]:
    """The commands of `write_commands`: a line of bash for each job.

    Runs that begin from one another are one line, `first && second && ...`, so that the jobs need
    not wait for each other. `python` is what the `launch.setup` of the cluster file makes it.
    """
    lines: dict[str, list[str]] = {}
    for run in _unfinished(runs, states):
        command = shell_words(["python", "-m", "nlscale", "train", str(run.folder / RECIPE_FILE)])
        shares = run.start is not None or bool(run.branches)
        lines.setdefault(run.chain if shares else run.name, []).append(command)
    return [" && ".join(commands) for commands in lines.values()]


def _unfinished(runs: list[Run], states: Mapping[str, Status]) -> list[Run]:
    """The runs that are still to do, those before that others begin from."""
    return [r for r in sorted(runs, key=lambda run: run.steps) if not states[r.name].finished]

"""Running a sweep as an array of Slurm jobs: one shell command a job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from nlscale.config import recipe
from nlscale.scaling.sweep.local import RECIPE_FILE
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.spec import Sweep
from nlscale.scaling.sweep.status import Status

COMMANDS_FILE = "commands.txt"


def write_commands(sweep: Sweep, runs: list[Run], states: Mapping[str, Status]) -> Path:
    """Write the recipes of the runs that have not finished, and one command line for each job.

    Runs that begin from one another are one line, `first && second && ...`, so that the jobs need
    not wait for each other. A run that has finished meanwhile, when its line is run again, says so
    and ends well. `python` is what the `launch.setup` of the cluster file makes it.
    """
    lines: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.steps):
        if states[run.name].finished:
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / RECIPE_FILE
        recipe.write(run.config, path, imports=True)
        command = shlex.join(["python", "-m", "nlscale", "train", str(path)])
        shares = run.start is not None or bool(run.branches)
        lines.setdefault(run.chain if shares else run.name, []).append(command)
    out = sweep.folder / COMMANDS_FILE
    out.write_text("".join(f"{' && '.join(commands)}\n" for commands in lines.values()))
    return out

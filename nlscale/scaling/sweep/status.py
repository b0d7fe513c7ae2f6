"""What has become of a run: read from its folder, which is all that a sweep remembers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.checkpoint import FOLDER
from nlscale.checkpoint.same_run import differences
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.telemetry.figures import METRICS_FILE, SUMMARY_FILE
from nlscale.train.folder import CONFIG_FILE

_TAIL_BYTES = 1 << 16  # more than a record of metrics.jsonl


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    step: int
    """The last step of which its metrics say something; 0 where there is none."""
    summary: dict[str, Any] | None
    """What its summary.json holds, once it has finished."""

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def word(self) -> str:
        """`finished`, `begun` or `to do`."""
        if self.finished:
            return "finished"
        return "begun" if self.step else "to do"


def status(run: Run) -> Status:
    """Where a run stands.

    Raises:
        UserError: its folder holds a checkpoint or the summary of another run.
    """
    summary = run.folder / SUMMARY_FILE
    if summary.exists() or checkpoints(run):
        _check_same(run)
    if summary.exists():
        return Status(run.steps, json.loads(summary.read_text()))
    return Status(last_step(run), None)


def last_step(run: Run) -> int:
    """The last step of which metrics.jsonl says something; 0 where there is none."""
    try:
        with open(run.folder / METRICS_FILE, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        if line.endswith(b"\n"):  # otherwise it is being written
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                return 0
    return 0


def checkpoints(run: Run) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (run.folder / FOLDER).glob("step-*")
    return sorted(path for path in found if path.name.removeprefix("step-").isdigit())


def checkpoint_at(run: Run, step: int) -> Path:
    """Where a run has its checkpoint of that step, as nlscale.checkpoint.store.store names it."""
    return run.folder / FOLDER / f"step-{step:08d}"


def _check_same(run: Run) -> None:
    written = run.folder / CONFIG_FILE
    if not written.exists():
        raise UserError(f"{run.folder} holds a run without its {CONFIG_FILE}; remove that folder")
    there = recipe.to_plain(recipe.load(written).config)
    changed = differences(recipe.to_plain(run.config), there)
    if changed:
        shown = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        raise UserError(
            f"{run.folder} holds another run than the sweep's {run.name}: {shown}; remove that "
            f"folder, or give the sweep another dir"
        )

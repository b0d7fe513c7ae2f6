"""What has become of a run: read from its folder, which is all that a sweep remembers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.checkpoint import FOLDER
from nlscale.checkpoint.same_run import differences
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.telemetry.figures import METRICS_FILE, SUMMARY_FILE
from nlscale.telemetry.records import parse
from nlscale.train.folder import CONFIG_FILE, read_summary

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

    A run whose summary is damaged, and whose checkpoints are there, has not finished: it makes its
    summary again.

    Raises:
        UserError: its folder holds a checkpoint or the summary of another run, or files that are
            damaged.
    """
    path = run.folder / SUMMARY_FILE
    if path.exists() or checkpoints(run):
        _check_same(run)
    try:
        summary = read_summary(path)
    except UserError as error:
        if not checkpoints(run):
            raise UserError(
                f"{error}; no checkpoint is left to make it again from: move {run.folder} away, or "
                f"give the sweep another dir"
            ) from None
        summary = None
    return Status(run.steps, summary) if summary else Status(last_step(run), None)


def last_step(run: Run) -> int:
    """The last step of which metrics.jsonl says something; 0 where there is none."""
    try:
        with open(run.folder / METRICS_FILE, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return 0
    for line in reversed(lines):
        if line.endswith(b"\n"):  # otherwise it is being written
            with suppress(ValueError):
                return int(parse(line).get("step") or 0)
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
    fix = f"move {run.folder} away, or give the sweep another dir"
    if not written.exists():
        raise UserError(f"{run.folder} holds a run without its {CONFIG_FILE}; {fix}")
    try:
        there = recipe.to_plain(recipe.load(written).config)
    except UserError as error:
        raise UserError(f"{written} cannot be read as that of {run.name}: {error}; {fix}") from None
    changed = differences(recipe.to_plain(run.config), there)
    if changed:
        shown = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        raise UserError(
            f"{run.folder} holds another run than the sweep's {run.name}: {shown}; {fix}"
        )

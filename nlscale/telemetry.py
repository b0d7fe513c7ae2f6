"""What a run tells the outside: metrics.jsonl and train.log always, the terminal, wandb.

Only rank 0 makes a `Telemetry`; every other rank holds `Telemetry.silent()`, whose methods do
nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from nlscale.errors import UserError
from nlscale.figures import METRICS_FILE, SUMMARY_FILE, draw_loss, human_count

LOG_FILE = "train.log"


@dataclass
class WandbOptions:
    """Where and whether to track the run with wandb."""

    enabled: bool = False
    """Track at all; metrics.jsonl is written either way."""
    project: str = "nlscale"
    """The wandb project."""
    name: str | None = None
    """The run's name; the name of the run directory by default."""
    mode: str = "auto"
    """online, offline, disabled, or auto: WANDB_MODE if set, else online if there is an API key
    (WANDB_API_KEY or netrc) and the server answers, else offline."""


class Telemetry:
    """Everything a run reports. A context manager: leaving it closes it, on exceptions too.

    Args:
        run_dir: where metrics.jsonl, train.log, summary.json, loss.png and wandb/ go; created if
            missing. Existing files are appended to (see `truncate_after`).
        total_steps: the steps of the whole run, those before a resume included.
        wandb: see `WandbOptions`. What fails in wandb is a warning, never an error.
        config: the run's configuration as plain dicts and lists, for wandb.
        tokens_per_step: tokens in a global batch.

    Raises:
        UserError: the directory or its files cannot be written, or the wandb mode is unknown.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        wandb: WandbOptions,
        config: dict[str, Any],
        tokens_per_step: int,
    ) -> None:
        modes = ("auto", "online", "offline", "disabled")
        if wandb.mode not in modes:
            raise UserError(f"wandb mode {wandb.mode!r} is unknown; use one of {', '.join(modes)}")
        self._run_dir = Path(run_dir)
        self._total_steps = total_steps
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {run_dir}: {error.strerror}") from error
        self._metrics = _LineFile(self._run_dir / METRICS_FILE)
        self._log = _LineFile(self._run_dir / LOG_FILE)
        self._screen: _PlainScreen | _LiveScreen = (
            _LiveScreen(total_steps) if _is_terminal() else _PlainScreen()
        )
        self._step_pace, self._validation_pace = _Pace(total_steps), _Pace(total_steps)
        self._first_step: tuple[int, float] | None = None
        self._last_validation: float | None = None
        self._was_finite = True
        self._wandb: _Wandb | None = None
        tokens = human_count(total_steps * tokens_per_step)
        self.note(
            f"run {self._run_dir.resolve().name}: {total_steps} steps of "
            f"{human_count(tokens_per_step)} tokens, {tokens} tokens in all"
        )
        if wandb.enabled:
            self._wandb = _Wandb(self._run_dir, wandb, config, self.note, self.warn)

    @staticmethod
    def silent() -> Telemetry:
        """The telemetry of every rank but the first: same methods, no effect."""
        return _Silent()

    def note(self, line: str) -> None:
        """A line in the terminal and in train.log (with the time of day)."""
        self._screen.line(line)
        self._log_line(line)

    def warn(self, line: str) -> None:
        """A note marked as a warning."""
        self._screen.line(f"warning: {line}", style="bold yellow")
        self._log_line(f"warning: {line}")

    def train_step(self, record: dict[str, Any]) -> None:
        """Report one training step (kind "train"; README, "Metrics", lists the keys and units).

        Raises:
            UserError: metrics.jsonl or train.log cannot be written.
        """
        now = monotonic()
        self._metrics.append(to_json(record))
        if self._wandb:
            self._wandb.log("train", record)
        step = int(record["step"])
        self._first_step = self._first_step or (step, now)
        first, started = self._first_step
        # Wall time a step, so that validation and checkpoints count; the first step, which
        # compiles and allocates, does not.
        pace = (now - started) / (step - first) if step > first else record["step_seconds"]
        status = Status.of(record, self._last_validation, pace * (self._total_steps - step))
        self._screen.update(step, status)
        is_finite = _is_finite(record["loss"])
        # The start of a bad stretch gets a line at once; the rest keeps the usual pace.
        if self._step_pace.due(step) or (self._was_finite and not is_finite):
            percent = 100 * step / self._total_steps
            width = len(str(self._total_steps))
            line = f"step {step:>{width}}/{self._total_steps}  {percent:3.0f}%  {status}"
            self._log_line(line)
            self._screen.progress_line(line)
        self._was_finite = is_finite

    def validation(self, record: dict[str, Any]) -> None:
        """Report one validation (kind "validation": step, tokens, loss in nats per token,
        bits_per_byte).

        Raises:
            UserError: metrics.jsonl or train.log cannot be written.
        """
        self._metrics.append(to_json(record))
        if self._wandb:
            self._wandb.log("validation", record)
        self._last_validation = record["loss"]
        if self._validation_pace.due(int(record["step"])):
            bits = record.get("bits_per_byte")
            per_byte = f"  {bits:.3f} bits per byte" if bits is not None else ""
            line = f"step {record['step']}  validation loss {_loss(record['loss'])}{per_byte}"
            self._log_line(line)
            self._screen.progress_line(line)

    def truncate_after(self, step: int) -> int:
        """Drop metrics.jsonl records of steps after `step`; returns how many.

        A run that resumes from `step` calls it first, or its file would show steps twice. The
        file is replaced at once or not at all.
        """
        return self._metrics.keep(lambda record: record.get("step", step) <= step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, draw loss.png, print the summary, end the wandb run.

        Raises:
            UserError: summary.json cannot be written. A figure that cannot be drawn is a warning.
        """
        path = self._run_dir / SUMMARY_FILE
        _replace(path, (json.dumps(json.loads(to_json(summary)), indent=2) + "\n").encode())
        self._screen.stop()
        try:
            draw_loss(self._run_dir)
        except Exception as error:  # the run is complete; a figure can be drawn again from the file
            self.warn(f"loss.png was not drawn: {error}")
        for line in summary_lines(summary):
            self.note(line)
        if self._wandb:
            self._wandb.finish(summary=summary)

    def close(self, failed: bool = False) -> None:
        """Release terminal, files and wandb; twice does no harm. `failed` marks the wandb run."""
        self._screen.stop()
        if self._wandb:
            self._wandb.finish(failed=failed)
        self._metrics.close()
        self._log.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _log_line(self, line: str) -> None:
        self._log.append(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {line}")

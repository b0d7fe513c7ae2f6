"""What a run tells the outside: metrics.jsonl and train.log always, the terminal, wandb.

Only rank 0 makes a `Telemetry`; every other rank holds `Telemetry.silent()`, whose methods do
nothing. A train record (units as written):

    {"kind": "train", "step": 17, "tokens": 557056, "loss": 2.31,   # steps and tokens done so far,
     "tokens_per_second": 21000.0, "step_seconds": 0.4,             # nats per token over the batch
     "time": 1795270000.0, "checkpoint_seconds": 0.0,               # Unix time; waited before it
     "mfu": 0.41, "peak_memory_bytes": 51539607552,                 # None where no peak is known
     "waits": {"data": 0.0, "link": 0.01, "host": 0.002},           # seconds of nothing to do
     "dropped_steps": 0, "dropped_because": None,                   # a text where it was dropped
     "bytes_sent": 654321, "bytes_saved": 123456,     # so far, inter-node, by a node; or not sent
     "levels": {"slow": {"period": 16, "learning_rate": 3e-3, "grad_norm": None, "updates": 1,
                         "reductions": 1, "updated": False, "window_fill": 0.06,
                         "update_ratio": None, "gradient_noise_scale": 4e5,     # tokens; and
                         "gradient_noise": 120.0, "gradient_signal": 3e-4}},    # of what
     "sources": {"web": {"loss": 2.3, "tokens": 334234, "epochs": 0.2}},  # where they are mixed
     "ranks": {"fastest": 0.30, "median": 0.31, "slowest": 0.38,      # seconds a rank computes of a
               "slowest_rank": 3, "slowest_host": "n1"}}              # step, where compared

and a validation record:

    {"kind": "validation", "step": 17, "tokens": 557056, "loss": 2.40, "bits_per_byte": 3.46,
     "time": 1795270000.0, "seconds": 1.5,
     "of_end": {"sequence_length": 4096, "loss": 2.31, "bits_per_byte": 3.33}}  # where another

with the `sources` of a mixture by name, of each its loss and bits_per_byte. After it come those of
`evaluate`, of kind "evaluation", with their `name` and their own figures.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from nlscale.config.units import human_count
from nlscale.errors import UserError
from nlscale.telemetry import screen
from nlscale.telemetry.figures import METRICS_FILE, SUMMARY_FILE, draw_loss
from nlscale.telemetry.files import LineFile, replace, to_json
from nlscale.telemetry.records import SET_ASIDE_FILE
from nlscale.telemetry.terminal import (
    LiveScreen,
    Pace,
    PlainScreen,
    evaluation_line,
    is_finite,
    is_terminal,
    step_line,
    summary_lines,
    validation_line,
)
from nlscale.telemetry.tracking import WandbOptions, WandbRun

__all__ = ["LOG_FILE", "Telemetry", "WandbOptions"]

LOG_FILE = "train.log"
_OF_EVERY_RECORD = ("kind", "step", "time", "seconds", "tokens")


class Telemetry:
    """Everything a run reports. A context manager: leaving it closes it, on exceptions too.

    Args:
        run_dir: where metrics.jsonl, train.log, summary.json, loss.png and wandb/ go; created
            where missing. Files that exist are appended to (see `truncate_after`).
        total_steps: steps of the whole run, those before a resume included.
        wandb: see `WandbOptions`. Whatever fails in wandb is a warning, never an error.
        config: the run's configuration as plain dicts and lists, for wandb.
        tokens_per_step: tokens in a global batch; None: they differ between the run's stages.
        tokens_until: planned, of the first steps of the run; None: as many a step.

    Raises:
        UserError: the directory or its files cannot be written, or the wandb mode is unknown.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        wandb: WandbOptions,
        config: dict[str, Any],
        tokens_per_step: int | None,
        tokens_until: Callable[[int], int] | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {run_dir}: {error.strerror}") from error
        self._total_steps = total_steps
        self._tokens_until = tokens_until or (lambda step: step * (tokens_per_step or 1))
        self._metrics = LineFile(self._run_dir / METRICS_FILE)
        self._log = LineFile(self._run_dir / LOG_FILE)
        self._screen = LiveScreen(total_steps) if is_terminal() else PlainScreen()
        self._step_pace, self._validation_pace = Pace(total_steps), Pace(total_steps)
        self._first: tuple[int, float] | None = None
        self._last_validation: float | None = None
        self._was_finite = True
        self._screen_is_lost = False
        each = "" if tokens_per_step is None else f" of {human_count(tokens_per_step)} tokens"
        self.note(
            f"run {self._run_dir.resolve().name}: {total_steps} steps{each}, "
            f"{human_count(self._tokens_until(total_steps))} tokens in all"
        )
        self._wandb: WandbRun | None = None
        if wandb.enabled:
            self._wandb = WandbRun(self._run_dir, wandb, config, self.note, self.warn)

    @staticmethod
    def silent() -> Telemetry:
        """The telemetry of every rank but the first: same methods, no effect."""
        return _Silent()

    @property
    def wandb_id(self) -> str | None:
        """The id under which wandb tracks the run, if it does."""
        return self._wandb.id if self._wandb else None

    def note(self, line: str) -> None:
        """A line in the terminal and, with date and time, in train.log."""
        self._screen.line(line)
        self._log_line(line)

    def warn(self, line: str) -> None:
        """A note marked as a warning."""
        self._screen.line(f"warning: {line}", warning=True)
        self._log_line(f"warning: {line}")

    def train_step(self, record: dict[str, Any]) -> None:
        """Report a training step; `record` as in the module's docstring.

        Raises:
            UserError: metrics.jsonl or train.log cannot be written.
        """
        self._metrics.append(to_json(record))
        if self._wandb:
            self._wandb.log("train", record)
        step, eta = record["step"], self._eta(record)
        self._screen.step(step, record, self._last_validation, eta)
        # A stretch of bad losses gets a line where it begins; the rest keeps the usual pace.
        begins_bad = self._was_finite and not is_finite(record["loss"])
        self._was_finite = is_finite(record["loss"])
        if self._step_pace.due(step) or begins_bad:
            self._progress(step_line(record, self._total_steps, self._last_validation, eta))

    def validation(self, record: dict[str, Any]) -> None:
        """Report a validation; `record` as in the module's docstring.

        Raises:
            UserError: metrics.jsonl or train.log cannot be written.
        """
        self._metrics.append(to_json(record))
        if self._wandb:
            self._wandb.log("validation", record)
        self._last_validation = record["loss"]
        if self._validation_pace.due(record["step"]):
            self._progress(validation_line(record, self._total_steps))

    def evaluation(self, name: str, record: dict[str, Any]) -> None:
        """Report an evaluation of that name; `record` as in the module's docstring.

        Raises:
            UserError: metrics.jsonl or train.log cannot be written.
        """
        self._metrics.append(to_json({"name": name, **record}))
        figures = {k: v for k, v in record.items() if k not in _OF_EVERY_RECORD}
        if self._wandb:
            self._wandb.log(f"evaluation/{name}", {"step": record["step"], **figures})
        self._progress(evaluation_line(name, record["step"], self._total_steps, figures))

    def records(self) -> list[dict[str, Any]]:
        """Those of the run so far, in metrics.jsonl."""
        return self._metrics.records()

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Move the records of steps after `step` out of metrics.jsonl; returns them.

        A run that resumes from `step` calls it first, or the file would show steps twice. They go
        to set-aside.jsonl, with lines that are no records, and a line says so.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        aside = self._run_dir / SET_ASIDE_FILE
        gone, unreadable = self._metrics.keep(
            lambda record: int(record.get("step") or 0) <= step, aside
        )
        if gone:
            steps = [int(record.get("step") or 0) for record in gone]
            self.note(
                f"records of steps {min(steps):,} to {max(steps):,} ({len(gone)} of them) are set "
                f"aside in {aside}: those steps are taken again"
            )
        if unreadable:
            self.warn(
                f"{METRICS_FILE}: {_lines(unreadable)} no record; set aside in {aside}, all others "
                f"are kept"
            )
        return gone

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, draw loss.png, print the summary and end the wandb run.

        `unigram_nats_per_token` or `unigram_bits_per_byte` in it becomes a line in the figure.

        Raises:
            UserError: summary.json cannot be written. A figure that fails is a warning.
        """
        replace(self._run_dir / SUMMARY_FILE, (to_json(summary, indent=2) + "\n").encode())
        self._screen.stop()
        figure = ""
        try:
            figure = f"figure: {draw_loss(self._run_dir)}"
        except Exception as error:  # the run itself is complete, and its figure can be redrawn
            self.warn(f"loss.png was not drawn: {error}")
        for line in [*summary_lines(summary), *filter(None, [figure])]:
            self.note(line)
        if self._wandb:
            self._wandb.finish(summary)

    def close(self, failed: bool = False) -> None:
        """Let go of terminal, wandb and files; twice does no harm.

        Args:
            failed: what to tell wandb, where `finish` has not been called.
        """
        self._screen.stop()
        if self._wandb:
            self._wandb.finish(failed=failed)
        self._note_lost_screen()
        self._metrics.close()
        self._log.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _eta(self, record: dict[str, Any]) -> float:
        """Seconds left, at the wall time that the tokens of a step have taken so far.

        Wall time counts validations and checkpoints; the first step, which allocates and
        compiles, does not count.
        """
        now, step = monotonic(), record["step"]
        if self._first is None:
            self._first = (step, now)
        first, started = self._first
        if step == first:
            first, started = step - 1, now - record["step_seconds"]
        end, done, before = map(self._tokens_until, (self._total_steps, step, first))
        return (now - started) / (done - before) * (end - done)

    def _progress(self, line: str) -> None:
        self._screen.progress_line(line)
        self._log_line(line)

    def _log_line(self, line: str) -> None:
        self._note_lost_screen()
        self._log.append(f"{_now()}  {line}")

    def _note_lost_screen(self) -> None:
        """Say once, where it still can be said, that nothing is shown any more."""
        why = screen.lost()
        if why is None or self._screen_is_lost:
            return
        self._screen_is_lost = True
        lost = f"the screen could not be written ({why}); the run goes on without it"
        self._log.append(f"{_now()}  warning: {lost}")


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="seconds")


def _lines(count: int) -> str:
    return "1 line is" if count == 1 else f"{count} lines are"


class _Silent(Telemetry):
    def __init__(self) -> None:
        pass

    @property
    def wandb_id(self) -> str | None:
        return None

    def note(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    def train_step(self, record: dict[str, Any]) -> None:
        pass

    def validation(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, name: str, record: dict[str, Any]) -> None:
        pass

    def records(self) -> list[dict[str, Any]]:
        return []

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        return []

    def finish(self, summary: dict[str, Any]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass

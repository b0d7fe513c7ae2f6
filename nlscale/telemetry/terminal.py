"""What a person watching the run reads: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from nlscale.config.units import human_bytes, human_count
from nlscale.levels.spectrum import said_periods

_LINES = 40
_WORTH_SAYING = 0.05
"""Share of a step spent waiting from which a line says it."""


class Pace:
    """Decides which steps get a plain line.

    The first, the last, and about 40 at even distances; and, so that a log never looks dead, one
    after a silence of 5 seconds, which grows to a tenth of the time elapsed and 10 minutes at
    most.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._every = max(1, math.ceil(total_steps / _LINES))
        self._started = self._last = monotonic()
        self._interval = -1

    def due(self, step: int) -> bool:
        """Whether `step` gets a line; to be asked once a step."""
        now, interval = monotonic(), step // self._every
        patience = min(max(5.0, (now - self._started) / 10), 600.0)
        silent = now - self._last >= patience
        if interval == self._interval and step < self._total_steps and not silent:
            return False
        self._interval, self._last = interval, now
        return True


class PlainScreen:
    """Standard output that is a file or a pipe: lines only."""

    def line(self, text: str, warning: bool = False) -> None:
        """Print a line."""
        print(text, flush=True)

    def step(
        self, step: int, record: Mapping[str, Any], validation: float | None, eta: float
    ) -> None:
        """Show the newest step; here the paced lines do."""

    def progress_line(self, text: str) -> None:
        """Print a line of progress, which a live display already shows."""
        self.line(text)

    def stop(self) -> None:
        """Leave the terminal as it was; twice does no harm."""


class LiveScreen(PlainScreen):
    """A terminal: a bar and the newest numbers in place, notes scroll above."""

    def __init__(self, total_steps: int) -> None:
        self._console = Console()
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("eta {task.fields[eta]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, eta="-")
        self._live: Live | None = None

    def line(self, text: str, warning: bool = False) -> None:
        """Print a line above the display."""
        style = "bold yellow" if warning else None
        self._console.print(Text(text, style=style or ""), soft_wrap=True)

    def step(
        self, step: int, record: Mapping[str, Any], validation: float | None, eta: float
    ) -> None:
        """Show the newest step in the display, which the first step starts."""
        self._bar.update(self._task, completed=step, eta=duration(eta))
        style = "" if is_finite(record["loss"]) else "bold red"
        lines = [Text(numbers(record, validation), style, no_wrap=True, overflow="ellipsis")]
        if updates := level_updates(record):
            lines.append(Text(updates, "dim", no_wrap=True, overflow="ellipsis"))
        shown = Group(self._bar, *lines)
        if self._live is None:
            self._live = Live(shown, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._live.update(shown)

    def progress_line(self, text: str) -> None:
        """Nothing: the display shows it."""

    def stop(self) -> None:
        """Leave the display as last drawn and give the cursor back."""
        if self._live is not None:
            self._live.stop()


def is_terminal() -> bool:
    """Whether standard output can redraw its lines."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def is_finite(loss: float | None) -> bool:
    """Whether a loss is a number."""
    return loss is not None and math.isfinite(loss)


def loss_text(loss: float | None) -> str:
    """A loss to three decimals, or what it is instead."""
    return f"{loss:.3f}" if loss is not None and is_finite(loss) else "NOT FINITE"


def numbers(record: Mapping[str, Any], validation: float | None) -> str:
    """The numbers of a train record: `loss 2.314  val 2.401  21.3k tok/s`."""
    # A step that was taken without one is a step of which no target counts.
    none = record["loss"] is None and record.get("dropped_because", "") is None
    parts = ["no loss" if none else f"loss {loss_text(record['loss'])}"]
    if validation is not None:
        parts.append(f"val {loss_text(validation)}")
    parts.append(f"{human_count(record['tokens_per_second']):>5} tok/s")
    if record.get("mfu"):
        parts.append(f"MFU {record['mfu']:.0%}")
    if (share := _waiting(record)) > _WORTH_SAYING:
        parts.append(f"waits {share:.0%}")
    if record.get("bytes_saved"):
        parts.append(f"not sent {human_bytes(record['bytes_saved'])}")
    if record.get("dropped_steps"):
        parts.append(f"dropped {record['dropped_steps']}")
    return "  ".join(parts)


def _waiting(record: Mapping[str, Any]) -> float:
    """Share of the time from the end of one step to that of the next; most of `host` is between."""
    waits = record.get("waits") or {"host": 0.0}
    whole = record["step_seconds"] + waits["host"]
    return sum(waits.values()) / whole if whole else 0.0


def level_updates(record: Mapping[str, Any]) -> str:
    """How often each level has updated: `updates base 120 medium 30 slow 7`; "" without levels."""
    levels = record.get("levels") or {}
    counts = " ".join(f"{name} {level['updates']}" for name, level in levels.items())
    return f"updates {counts}" if counts else ""


def step_line(
    record: Mapping[str, Any], total_steps: int, validation: float | None, eta: float
) -> str:
    """The plain line of a step; `validation` is the latest loss, `eta` in seconds."""
    parts = [
        step_of(record, total_steps),
        f"{100 * record['step'] // max(total_steps, 1):3d}%",
        numbers(record, validation),
        f"eta {duration(eta)}",
        level_updates(record),
    ]
    return "  ".join(part for part in parts if part)


def validation_line(record: Mapping[str, Any], total_steps: int) -> str:
    """The plain line of a validation."""
    loss, bits = record["loss"], record["bits_per_byte"]
    parts = ["no validation loss" if loss is None else f"validation loss {loss_text(loss)}"]
    if bits is not None:
        parts.append(f"{loss_text(bits)} bits per byte")
    if (end := record.get("of_end")) is not None:
        parts.append(f"{loss_text(end['loss'])} at {end['sequence_length']:,} tokens")
    return "  ".join([step_of(record, total_steps), *parts])


def evaluation_line(name: str, step: int, total_steps: int, figures: Mapping[str, Any]) -> str:
    """The plain line of an evaluation: those of its figures that are numbers."""
    shown = [f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)]
    return "  ".join([step_of({"step": step}, total_steps), name, *shown])


def step_of(record: Mapping[str, Any], total_steps: int) -> str:
    """`step  20/400`, as wide at every step."""
    return f"step {record['step']:>{len(str(total_steps))}}/{total_steps}"


def duration(seconds: float) -> str:
    """Seconds as a person says them, in two units: 9s, 2m10s, 3h05m, 2d04h."""
    whole = max(0, round(seconds))
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller_size:02d}{smaller}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary as aligned lines, keys of nested mappings dotted, a line for each level."""
    rows = list(_flat(summary, ""))
    for level in summary.get("levels", ()):
        # those of older versions have one alone
        periods = [own["period_steps"] for own in level.get("periods", [level])]
        every = "step" if max(periods) == 1 else f"{said_periods(periods)} steps"
        rows.append(
            (
                f"level {level['name']}",
                f"every {every}: {_times(level['updates'], 'update')}, "
                f"{_times(level['reductions'], 'reduction')}, "
                f"{human_count(level['parameters'])} parameters",
            )
        )
    width = max((len(key) for key, _ in rows), default=0)
    return ["summary", *(f"  {key:<{width}}  {value}" for key, value in rows)]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)):
            yield f"{prefix}{key}".replace("_", " "), _value(value)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _times(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

"""The starts of a run, in run.dir/attempts.jsonl: how each ended, and what became of its time.

A run that is preempted, killed and requeued is one run with several attempts. From them follows
when to give up (a job that fails again and again at the same place), and the goodput: the share of
the wall time, from the first start on, in which steps were taken that the finished run consists of.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nlscale.errors import GaveUp, UserError

FILE = "attempts.jsonl"
_NUMBERS = {"begin": ("time", "trains", "step", "redone", "down"), "end": ("time",)}
_TEXTS = {"begin": "job", "end": "reason"}


class Attempts:
    """The attempts at the run in that folder, oldest first, and this one.

    Args:
        run_dir: of the run.
        may_write: whether this process may write there, asked each time: where it may not, how it
            ends is not noted.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, run_dir: Path, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path = Path(run_dir) / FILE
        self._may_write = may_write
        self._job = job()
        self.events: list[dict[str, Any]] = []
        self.unreadable = 0
        """Lines that are no events, such as one torn by a kill; they are passed over."""
        self.read()

    def read(self) -> None:
        """Read the file anew.

        Raises:
            UserError: it cannot be read.
        """
        try:
            lines = self._path.read_bytes().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}") from None
        found = [_event(line) for line in lines]
        self.events = [event for event in found if event is not None]
        self.unreadable = len(found) - len(self.events)

    def warnings(self) -> list[str]:
        """A line where the file holds what is no event."""
        if not self.unreadable:
            return []
        lines = "1 line is" if self.unreadable == 1 else f"{self.unreadable} lines are"
        return [f"{self._path}: {lines} no event of a start, and passed over"]

    def check(self, checkpoint: int, most: int) -> None:
        """Refuse to start a Slurm job again that has made no new checkpoint for too long.

        A person who starts a run by hand, or submits it again, begins to count anew.

        Args:
            checkpoint: step of the newest checkpoint, 0 where there is none.
            most: restarts without a newer one that are allowed.

        Raises:
            GaveUp: there were more.
        """
        if self._job is None:
            return
        begun = [e for e in self.events if e["event"] == "begin" and e.get("job") == self._job]
        stuck = 0
        for event in reversed(begun):
            if event["step"] < checkpoint:
                break
            stuck += 1
        if stuck <= most:
            return
        reasons = [e.get("reason") for e in self.events if e["event"] == "end"][-1:]
        last = (reasons and reasons[0]) or "without a word, as if killed"
        raise GaveUp(
            f"{self._path.parent} was started {stuck} time{'s' * (stuck > 1)} by {self._job} "
            f"without getting to a checkpoint after step {checkpoint}; it is not started again "
            f"(run.max_restarts is {most}). It last ended: {last}"
        )

    def begin(self, started: float, step: int, redone: float, seen: float | None) -> None:
        """Note that this attempt begins to train.

        Args:
            started: Unix time at which the process began.
            step: from which it goes on.
            redone: seconds of steps taken before that are lost and taken again.
            seen: Unix time of the last step before, None where there was none.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._write(
                event="begin",
                time=started,
                trains=time.time(),
                step=step,
                redone=redone,
                down=max(0.0, started - seen) if seen is not None else 0.0,
                job=self._job,
                host=socket.gethostname(),
            )
        except OSError as error:
            raise UserError(f"cannot append to {self._path}: {error.strerror}") from None

    def end(self, reason: str) -> None:
        """Note why this attempt ends; of all ranks, one does."""
        with contextlib.suppress(OSError, UserError):  # the reason is said anyway
            if self._may_write():
                self._write(event="end", time=time.time(), reason=reason)

    def _write(self, **event: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read(1) not in (b"", b"\n")  # by a kill: this is a line of its own
            line = b"\n" * torn + json.dumps(event).encode() + b"\n"
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
        self.events.append(event)


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None: it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in _NUMBERS:
        return None
    numbers = all(isinstance(event.get(name), int | float) for name in _NUMBERS[kind])
    text = event.get(_TEXTS[kind])
    return event if numbers and (isinstance(text, str) or text is None) else None


def job() -> str | None:
    """What started this run and may start it again by itself: a Slurm job, or nothing."""
    number = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {number}" if number else None


def time_spent(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that these records of metrics.jsonl stand for.

    Returns:
        `training` (steps that were admitted), `dropped` (steps that were not), `validation` and
        `checkpoints` (in which training waited for the copy).
    """
    spent = dict.fromkeys(("training", "dropped", "validation", "checkpoints"), 0.0)
    dropped = 0
    for record in records:
        kind = record.get("kind")
        if kind in ("validation", "evaluation"):
            spent["validation"] += record.get("seconds") or 0.0
        elif kind == "train":
            now = record.get("dropped_steps") or 0
            spent["training" if now == dropped else "dropped"] += record.get("step_seconds") or 0.0
            spent["checkpoints"] += record.get("checkpoint_seconds") or 0.0
            dropped = now
    return spent


def goodput(
    events: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]], now: float
) -> dict[str, float]:
    """What became of the time since the first start; shares that sum to 1, but for `wall_seconds`.

    `training` is the goodput. The rest went to `startup` (until the first step of each attempt),
    `down` (between attempts), `redone` (steps lost with an attempt and taken again), `validation`,
    `checkpoints`, `dropped` steps, and `other`.
    """
    begun = [event for event in events if event.get("event") == "begin"]
    wall = now - begun[0]["time"]
    seconds = time_spent(records)
    seconds["startup"] = sum(event["trains"] - event["time"] for event in begun)
    for name in ("down", "redone"):
        seconds[name] = sum(event[name] for event in begun)
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    return {"wall_seconds": wall, **{name: value / wall for name, value in seconds.items()}}

"""The starts of a run, in run.dir/attempts.jsonl: how each ended, and what became of its time.

A run that is preempted, killed and requeued is one run with several attempts. From them follows
when to give up (a job that fails again and again at the same place), and the goodput: the share of
the wall time, from the first start on, in which steps were taken that the finished run consists of.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nlscale.errors import GaveUp, UserError

FILE = "attempts.jsonl"


class Attempts:
    """The attempts at the run in that folder, oldest first, and this one.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = Path(run_dir) / FILE
        self._job = job()
        self.events: list[dict[str, Any]] = []
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}") from None
        for line in lines:
            with contextlib.suppress(ValueError):  # torn by a kill
                self.events.append(json.loads(line))

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
        begun = [e for e in self.events if e["event"] == "begin" and e["job"] == self._job]
        stuck = 0
        for event in reversed(begun):
            if event["step"] < checkpoint:
                break
            stuck += 1
        if stuck <= most:
            return
        reasons = [e["reason"] for e in self.events if e["event"] == "end"][-1:]
        last = reasons[0] if reasons else "without a word, as if killed"
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
        """
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

    def end(self, reason: str) -> None:
        """Note why this attempt ends; of all ranks, one does."""
        with contextlib.suppress(OSError):  # the reason is said anyway
            self._write(event="end", time=time.time(), reason=reason)

    def _write(self, **event: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.events.append(event)


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
        if record["kind"] in ("validation", "evaluation"):
            spent["validation"] += record["seconds"]
            continue
        admitted = record["dropped_steps"] == dropped
        dropped = record["dropped_steps"]
        spent["training" if admitted else "dropped"] += record["step_seconds"]
        spent["checkpoints"] += record["checkpoint_seconds"]
    return spent


def goodput(
    events: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]], now: float
) -> dict[str, float]:
    """What became of the time since the first start; shares that sum to 1, but for `wall_seconds`.

    `training` is the goodput. The rest went to `startup` (until the first step of each attempt),
    `down` (between attempts), `redone` (steps lost with an attempt and taken again), `validation`,
    `checkpoints`, `dropped` steps, and `other`.
    """
    begun = [event for event in events if event["event"] == "begin"]
    wall = now - begun[0]["time"]
    seconds = time_spent(records)
    seconds["startup"] = sum(event["trains"] - event["time"] for event in begun)
    for name in ("down", "redone"):
        seconds[name] = sum(event[name] for event in begun)
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    return {"wall_seconds": wall, **{name: value / wall for name, value in seconds.items()}}

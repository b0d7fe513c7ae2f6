"""When the job around a run ends, and by when the run must stop to get its checkpoint written."""

from __future__ import annotations

import math
import os
import time

from nlscale.errors import UserError

VARIABLE = "NLSCALE_JOB_END"
"""Unix time at which the job ends; launch/slurm/train.sbatch sets it. Unset: nothing ends it."""
_RESERVE_SECONDS = 30.0
"""For ending: closing files and process groups, and Slurm's own clock."""


class Deadline:
    """The end of the job, as the environment gives it.

    Raises:
        UserError: the variable is no time.
    """

    def __init__(self) -> None:
        text = os.environ.get(VARIABLE)
        self.end: float | None = None
        if text:
            self.end = _seconds(text)

    def refuse_past(self) -> None:
        """Refuse a job that has ended before this run begins: the time of another one is left over.

        The run would stop after every step, and be started again.

        Raises:
            UserError: it has passed.
        """
        if self.end is not None and self.end <= time.time():
            raise UserError(
                f"{VARIABLE}={os.environ[VARIABLE]} has passed, "
                f"{time.time() - self.end:.0f} s ago: it is of another job; unset it"
            )

    def is_near(self, seconds: float, save_seconds: float) -> bool:
        """Whether to stop after the step that begins now.

        Args:
            seconds: what this step and the next take, with all that is between.
            save_seconds: what it took last from asking for a checkpoint to the end of all that
                follows from it, 0 where that is not known; it is counted twice, as a file system
                that others use may be slower next time.
        """
        if self.end is None:
            return False
        return time.time() + seconds + 2 * save_seconds + _RESERVE_SECONDS > self.end


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{VARIABLE}={text!r} is not a time in Unix seconds")
    return seconds

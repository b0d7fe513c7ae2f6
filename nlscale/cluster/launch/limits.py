"""Slurm's time limits: what `launch.slurm.time` may say, and whether the warning fits into it."""

from __future__ import annotations

import re

from nlscale.cluster.machines import Slurm
from nlscale.errors import UserError

_FORMS = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?")
_NO_LIMIT = ("unlimited", "infinite")
_SECONDS_OF_DAYS = (3600, 60, 1)  # days-hours[:minutes[:seconds]]
_SECONDS_OF = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}  # minutes, minutes:seconds, hours:...
_MOST_DAYS = 3650
_EARLIER = 60
"""Seconds by which Slurm may give its warning earlier than it was asked to."""


def seconds(time: str) -> int | None:
    """The time limit that sbatch reads in a text; None: there is none.

    Args:
        time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
            days-hours:minutes:seconds, UNLIMITED or INFINITE.

    Raises:
        UserError: it is none of these, or 0, which Slurm would take for no limit.
    """
    if time.lower() in _NO_LIMIT:
        return None
    found = _FORMS.fullmatch(time)
    if found is None:
        raise UserError(
            f"launch.slurm.time {time!r} is not a time limit; write [days-]hours:minutes:seconds "
            f"in quotes, such as '24:00:00'"
        )
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = _SECONDS_OF_DAYS if days is not None else _SECONDS_OF[len(numbers)]
    total = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if total == 0:
        raise UserError(
            f"launch.slurm.time {time!r} is 0, which Slurm takes for no limit at all; write "
            f"UNLIMITED if that is meant"
        )
    if total > _MOST_DAYS * 86400:
        raise UserError(
            f"launch.slurm.time {time!r} is more than {_MOST_DAYS} days; write UNLIMITED if no "
            f"limit is meant"
        )
    return total


def check_warning(slurm: Slurm) -> None:
    """Refuse a warning that would come as soon as the job has begun.

    The run would stop at once, be requeued, and get nowhere.

    Raises:
        UserError: `warn_seconds` is not above 0 or leaves no time to train; or `time` is none.
    """
    limit, warning = seconds(slurm.time), slurm.warn_seconds
    if warning < 1:
        raise UserError(
            f"launch.slurm.warn_seconds is {warning}; it must be above 0: without a warning a run "
            f"cannot save before its time is up"
        )
    if limit is not None and warning + _EARLIER >= limit:
        fits = limit - _EARLIER - 1
        fix = f"use {fits} at most, or a longer time" if fits > 0 else "use a longer time"
        raise UserError(
            f"launch.slurm.warn_seconds {warning} leaves nothing of launch.slurm.time "
            f"{slurm.time!r}, {limit} seconds (Slurm may warn {_EARLIER} seconds earlier): the run "
            f"would be told to stop as soon as it begins; {fix}"
        )

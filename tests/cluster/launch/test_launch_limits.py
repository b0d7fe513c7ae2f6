"""Time limits as sbatch reads them, and warnings that leave time to train."""

from __future__ import annotations

import re

import pytest

from nlscale.cluster.launch.limits import check_warning, seconds
from nlscale.cluster.machines import Slurm
from nlscale.errors import UserError


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:05", 5405),
        ("100:00:00", 360000),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:10", 217810),
        ("0-0:0:1", 1),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_time_limits_are_what_sbatch_reads(text: str, means: int | None) -> None:
    assert seconds(text) == means


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "1:2:3:4", "1-", "-1", "1.5", "1h", " 5", "5 ", "1-2:3:4:5", "24:00:00\n",
     "1\u0663", "9" * 5000],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a time limit"):
        seconds(text)


@pytest.mark.parametrize("text", ["0", "00:00:00", "0-0"])
def test_zero_is_refused_as_slurm_takes_it_for_no_limit(text: str) -> None:
    with pytest.raises(UserError, match="write UNLIMITED"):
        seconds(text)


@pytest.mark.parametrize(
    ("time", "warning", "says"),
    [
        ("00:05:00", 300, "leaves nothing of launch.slurm.time '00:05:00', 300 seconds"),
        ("00:05:00", 600, "use 239 at most, or a longer time"),
        ("00:05:00", 240, "Slurm may warn 60 seconds earlier"),
        ("1", 1, "use a longer time"),
        ("1-0", 86400, "leaves nothing"),
        ("24:00:00", 0, "must be above 0"),
    ],
)
def test_a_warning_that_would_come_at_once_is_refused(time: str, warning: int, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_warning(Slurm(time=time, warn_seconds=warning))


@pytest.mark.parametrize(("time", "warning"), [("00:05:00", 239), ("UNLIMITED", 300), ("1-0", 300)])
def test_a_warning_that_leaves_time_is_taken(time: str, warning: int) -> None:
    check_warning(Slurm(time=time, warn_seconds=warning))

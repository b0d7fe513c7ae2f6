"""How far the nodes' clocks are apart, as NTP measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nlscale.cluster.doctor.findings import Finding, Grade, merged
from nlscale.cluster.doctor.meeting import Meeting

_ROUNDS = 12
_APART = 1.0  # seconds
_CHECK = "clocks"


@dataclass(frozen=True)
class Offset:
    """A clock against the first node's."""

    seconds: float
    """How far it is ahead."""
    round_trip: float
    """Of the message that measured it, seconds: the offset is known to half of it."""


def measure(
    meeting: Meeting, leaders: list[int], clock: Callable[[], float] = time.time
) -> Offset | None:
    """Compare the clock of one rank a node with the first rank's, one node after the other.

    Args:
        meeting: of all ranks; only `leaders` take part.
        leaders: a rank of each node, the first rank first.
        clock: seconds since the epoch.

    Returns:
        This rank's offset; None on the first rank, and on those that take no part.
    """
    rank = meeting.place.rank
    if rank == 0:
        for leader in leaders[1:]:
            _answer(meeting, leader, clock)
        return None
    if rank not in leaders:
        return None
    best = None
    for turn in range(_ROUNDS):
        started = clock()
        meeting.say(f"clock/{rank}/{turn}")
        answer = float(meeting.hear(f"clock/{rank}/{turn}/answer"))
        ended = clock()
        # what takes shortest had least time to wait on one of its two ways
        if best is None or ended - started < best.round_trip:
            best = Offset((started + ended) / 2 - answer, ended - started)
    return best


def _answer(meeting: Meeting, leader: int, clock: Callable[[], float]) -> None:
    for turn in range(_ROUNDS):
        if leader in meeting.lost or not meeting.reached(leader, _CHECK, f"clock/{leader}/{turn}"):
            return
        meeting.say(f"clock/{leader}/{turn}/answer", clock())


def judge(offsets: dict[str, Offset], first: str) -> list[Finding]:
    """Name the hosts whose clock is off.

    Args:
        offsets: against the first host's clock, by host, without the first itself.
        first: its name.
    """
    findings = []
    for host, offset in offsets.items():
        if abs(offset.seconds) <= _APART:
            continue
        way = "ahead of" if offset.seconds > 0 else "behind"
        findings.append(
            Finding(
                _CHECK,
                Grade.warning,
                f"{abs(offset.seconds):,.1f} s {way} {first}",
                "logs, wandb and file times will not agree: run chrony or systemd-timesyncd on all "
                "nodes (`timedatectl set-ntp true`)",
                (host,),
            )
        )
    if not findings:
        largest = max((abs(offset.seconds) for offset in offsets.values()), default=0.0)
        return [Finding(_CHECK, Grade.ok, f"at most {max(largest * 1e3, 0.1):,.1f} ms apart")]
    return merged(findings, [first, *offsets])

"""The checks of several nodes: every rank calls `examine`, the first one makes the report.

Nothing here waits for a process group: ranks meet over a store first and tell what they see, and
gloo or NCCL is tried only where nothing speaks against it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from nlscale.cluster.doctor import (
    arrivals,
    clocks,
    data_folder,
    disk,
    environment,
    hardware,
    links,
    network,
    shared_files,
    versions,
)
from nlscale.cluster.doctor.arrivals import Arrival
from nlscale.cluster.doctor.environment import Environment
from nlscale.cluster.doctor.findings import Finding, Grade, worst
from nlscale.cluster.doctor.machine import Asked
from nlscale.cluster.doctor.meeting import Meeting, cannot_resolve, meet, place_among_ranks, resolve
from nlscale.cluster.doctor.report import Report

_STOPS_THE_NETWORK = ("gloo address", "NCCL interface", "GPUs", "GPUs alike")
"""Checks after whose errors gloo or NCCL would hang or fail: that is then no news."""


def examine(asked: Asked, say: Callable[[str], None], show: Callable[[Report], None]) -> int:
    """Check all nodes together.

    Args:
        asked: by the command line, alike on all ranks.
        say: shows progress, on the first rank.
        show: prints the report, on the first rank, before any rank ends.

    Returns:
        The exit code, the same on all ranks.

    Raises:
        UserError: this rank cannot meet the others.
    """
    started = time.monotonic()
    here, around = place_among_ranks(), environment.probe()
    report = Report([around.hostname], 1)
    meeting = None
    if here.rank == 0 and resolve(here.address) is None:
        measured, advice = cannot_resolve(here).split("; ")
        report.findings.append(Finding("ranks", Grade.error, measured, advice))
        report.findings += environment.judge_limits({around.hostname: around})
        report.findings += environment.judge_addresses({around.hostname: around})
    else:
        say(f"waiting for {here.world} ranks at {here.meeting_point}")
        meeting = meet(here, asked.timeout)
        mine = Arrival(around.hostname, here.local_rank, here.local_world)
        come = meeting.gather("arrival", [asdict(mine), asdict(around)], range(here.world))
        names = _open_report(report, meeting, come, asked) if here.rank == 0 else None
        names = meeting.tell("names", names)
        if names is not None:
            _Examination(meeting, asked, say, names, report).run()
    report.seconds = time.monotonic() - started
    if here.rank == 0:
        show(report)
    return report.exit_code if meeting is None else meeting.leave(report.exit_code)


def _open_report(
    report: Report, meeting: Meeting, come: dict[int, Any], asked: Asked
) -> list[str] | None:
    """Judge who has come and what surrounds them; the names of the nodes, None to stop here."""
    here = meeting.place
    arrived = {rank: Arrival(**arrival) for rank, (arrival, _) in come.items()}
    around = {rank: Environment(**found) for rank, (_, found) in come.items()}
    names = arrivals.names(here, arrived)
    first_of = {name: min(r for r in around if names[r] == name) for name in names.values()}
    report.hosts, report.ranks = list(first_of), len(arrived)
    by_host = {name: around[rank] for name, rank in first_of.items()}
    report.measured["environment"] = {name: asdict(found) for name, found in by_host.items()}
    report.findings += arrivals.judge(here, arrived, names, asked.timeout, asked.cluster)
    report.findings += environment.judge_limits(by_host, here.world, here.local_world)
    report.findings += environment.judge_addresses(by_host)
    complete = not any(f.check == "ranks" and f.grade == Grade.error for f in report.findings)
    return report.hosts if complete else None


class _Examination:
    """What is done once all ranks are there, in the same order on each of them."""

    def __init__(
        self,
        meeting: Meeting,
        asked: Asked,
        say: Callable[[str], None],
        names: list[str],
        report: Report,
    ) -> None:
        self._meeting, self._asked, self._say, self._names = meeting, asked, say, names
        self._report, self._findings = report, report.findings
        self._here = meeting.place
        self._first, self._leads = self._here.rank == 0, self._here.local_rank == 0
        self._leaders = list(range(0, self._here.world, self._here.local_world))
        self._nodes = [list(range(n, n + self._here.local_world)) for n in self._leaders]

    def run(self) -> None:
        """All checks; on the first rank the report is filled."""
        self._machines()
        self._files()
        self._data()
        self._clocks()
        self._network()
        for rank, check in self._meeting.lost.items():
            measured = f"rank {rank} stopped answering in the check of {check}"
            advice = "its own output says why; it was left out of what followed"
            self._findings.append(
                Finding("ranks", Grade.error, measured, advice, (self._host(rank),))
            )

    def _machines(self) -> None:
        self._say("versions and GPUs")
        mine = None
        if self._leads:
            machine = hardware.probe()
            found = versions.probe(machine.driver)
            mine = [asdict(machine), found, versions.probe_requirements()]
        gathered = self._gather("versions", mine)
        if not self._first:
            return
        machines = {host: hardware.Hardware.from_plain(m) for host, (m, _, _) in gathered.items()}
        installed = {host: found for host, (_, found, _) in gathered.items()}
        unmet = {host: lacks for host, (_, _, lacks) in gathered.items()}
        self._keep("hardware", machines)
        self._report.measured["versions"] = installed
        self._findings += versions.judge(installed, unmet)
        per_node = self._here.local_world
        self._findings += hardware.judge(machines, per_node, self._asked.cluster)

    def _files(self) -> None:
        path = self._asked.path
        with ExitStack() as stack:
            self._say(f"whether all nodes share {path}")
            folder = self._meeting.tell("folder", self._show(stack) if self._first else None)
            if folder is not None:
                self._look(*folder)
            self._say(f"disk at {path}")
            mine = None
            if self._leads and path.is_dir():  # where it is not, the check before has said so
                mine = asdict(disk.probe(path))
            gathered = self._gather("disk", mine)
        disks = {host: disk.Disk(**found) for host, found in gathered.items() if found}
        if self._first and disks:
            self._keep("disk", disks)
            self._findings += disk.judge(disks)

    def _show(self, stack: ExitStack) -> list[str] | None:
        """On the first rank: a folder for the others to look into, with a token in it."""
        path, token = self._asked.path, secrets.token_hex(16)
        try:
            stack.enter_context(disk.made_folder(path))
            folder = stack.enter_context(disk.scratch_folder(path))
            shared_files.show(folder / "first", token)
        except OSError as error:
            self._findings.append(disk.cannot_write(path, error, self._names[0]))
            return None
        return [folder.name, token]

    def _look(self, name: str, token: str) -> None:
        """Every rank looks for the first one's file, the first for one of each node."""
        folder = self._asked.path / name
        seen = None
        if not self._first:
            seen = shared_files.look(folder / "first", token)
            if seen is None and self._leads:
                try:
                    shared_files.show(folder / f"node-{self._here.rank}", token)
                except OSError as error:
                    seen = f"is there, but writing beside it fails: {error.strerror}"
        others = [rank for rank in range(1, self._here.world)]
        gathered = self._meeting.gather("shared folder", seen, others)
        if not self._first or len(self._nodes) == 1:
            return
        unseen_by: dict[str, str | None] = dict.fromkeys(self._names[1:])
        for rank, said in gathered.items():
            if said is not None and rank >= self._here.local_world:
                unseen_by[self._host(rank)] = said
        unseen_from = {
            self._host(rank): shared_files.look(folder / f"node-{rank}", token)
            for rank in self._leaders[1:]
            if unseen_by[self._host(rank)] is None and rank not in self._meeting.lost
        }
        path = str(self._asked.path)
        self._findings += shared_files.judge(path, self._names[0], unseen_by, unseen_from)

    def _data(self) -> None:
        path = self._asked.data
        if path is None:
            return
        self._say(f"data at {path}")
        mine = asdict(data_folder.probe(path)) if self._leads else None
        gathered = self._gather("data", mine)
        if self._first:
            found = {host: data_folder.Data(**data) for host, data in gathered.items()}
            self._keep("data", found)
            self._findings += data_folder.judge(found)

    def _clocks(self) -> None:
        if len(self._nodes) == 1:
            return
        self._say("clocks")
        mine = clocks.measure(self._meeting, self._leaders)
        gathered = self._gather("clocks", asdict(mine) if mine else None)
        offsets = {host: clocks.Offset(**found) for host, found in gathered.items() if found}
        if self._first:
            self._keep("clocks", offsets)
            self._findings += clocks.judge(offsets, self._names[0])

    def _network(self) -> None:
        goes = None
        if self._first:
            against = (f for f in self._findings if f.check in _STOPS_THE_NETWORK)
            goes = not self._meeting.lost and worst(against) != Grade.error
        if not self._meeting.tell("the network can be measured", goes):
            measured = "not measured, because of the errors above"
            self._findings.append(Finding("network", Grade.note, measured))
            return
        mine = network.measure(self._meeting, self._nodes, self._say)
        everyone = range(self._here.world)
        gathered = self._meeting.gather("the network", mine, everyone)
        if self._first and not self._meeting.lost:
            found = network.assemble(gathered, self._nodes, self._names)
            self._report.measured["network"] = asdict(found)
            self._findings += links.judge(found, self._asked.cluster)

    def _gather(self, check: str, mine: Any) -> dict[str, Any]:
        """What the leaders measured, by host; {} on other ranks than the first."""
        gathered = self._meeting.gather(check, mine, self._leaders)
        return {self._host(rank): value for rank, value in gathered.items()}

    def _keep(self, check: str, found: dict[str, Any]) -> None:
        self._report.measured[check] = {host: asdict(value) for host, value in found.items()}

    def _host(self, rank: int) -> str:
        return self._names[rank // self._here.local_world]

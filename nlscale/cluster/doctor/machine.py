"""The checks of one machine by itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nlscale.cluster.doctor import data_folder, disk, environment, hardware, versions
from nlscale.cluster.doctor.report import Report
from nlscale.cluster.life.place import place
from nlscale.cluster.machines import Cluster


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    path: Path
    """Where runs, and so checkpoints, will be written."""
    data: Path | None
    """A data folder to look at."""
    cluster: Cluster | None
    """What the nodes are said to be."""
    timeout: float
    """Seconds to wait for a rank that does not come or answer."""


def examine(asked: Asked, say: Callable[[str], None]) -> Report:
    """Check this machine.

    Args:
        asked: by the command line.
        say: shows progress.
    """
    started = time.monotonic()
    host = socket.gethostname()
    report = Report([host], 1)
    findings, measured = report.findings, report.measured

    say("limits and addresses")
    around = environment.probe()
    measured["environment"] = {host: asdict(around)}
    findings += environment.judge_limits({host: around})
    findings += environment.judge_addresses({host: around})

    say("versions and GPUs")
    machine = hardware.probe()
    found = versions.probe(machine.driver)
    measured["versions"], measured["hardware"] = {host: found}, {host: asdict(machine)}
    findings += versions.judge({host: found}, {host: versions.probe_requirements()})
    here = place()
    ranks = here.local_world if here.meets else None
    findings += hardware.judge({host: machine}, ranks, asked.cluster)

    say(f"disk at {asked.path}")
    try:
        with disk.made_folder(asked.path):
            under = disk.probe(asked.path)
    except OSError as error:
        findings.append(disk.cannot_write(asked.path, error, host))
    else:
        measured["disk"] = {host: asdict(under)}
        findings += disk.judge({host: under})

    if asked.data is not None:
        say(f"data at {asked.data}")
        data = data_folder.probe(asked.data)
        measured["data"] = {host: asdict(data)}
        findings += data_folder.judge({host: data})
    report.seconds = time.monotonic() - started
    return report

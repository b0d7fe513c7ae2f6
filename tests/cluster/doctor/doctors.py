"""Running `nlscale doctor` on ranks, and made-up measurements for its judges."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import replace
from typing import Any

from nlscale import cli
from nlscale.cluster.doctor.disk import Disk
from nlscale.cluster.doctor.environment import Environment
from nlscale.cluster.doctor.findings import Finding, Grade
from nlscale.cluster.doctor.hardware import Gpu, Hardware, Health
from nlscale.cluster.machines import Cluster

Ended = tuple[int, str, str]
"""Exit code, standard output and standard error."""


def run(*arguments: str) -> Ended:
    """Run `nlscale doctor` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(["doctor", *arguments])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def as_rank(arguments: list[str], changes: dict[int, dict[str, str]]) -> Ended:
    """The same as one of several ranks; `changes`: its environment, by rank."""
    os.environ.update(changes.get(int(os.environ["RANK"]), {}))
    return run("--nodes", *arguments)


def findings(report: str) -> dict[str, list[dict[str, Any]]]:
    """The findings of a JSON report, by check."""
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(report)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def grades(found: list[Finding]) -> list[tuple[str, Grade, tuple[str, ...]]]:
    """What matters of findings, without their words."""
    return [(finding.check, finding.grade, finding.hosts) for finding in found]


def one(found: list[Finding], grade: Grade) -> Finding:
    """The only finding of a grade."""
    (finding,) = [finding for finding in found if finding.grade == grade]
    return finding


SOUND = Environment(
    hostname="node-a",
    network="machine-a/1",
    resolved="192.0.2.1",
    usable=True,
    interfaces={"lo": "127.0.0.1", "docker0": "172.17.0.1", "ib0": "192.0.2.1"},
    gloo_interface=None,
    nccl_interface=None,
    open_files=65536,
    most_open_files=65536,
    shared_memory=8_000_000_000,
    threads=4,
    cores=32,
    own_cores=32,
)
"""The environment of a node with which nothing is wrong."""

OTHER = replace(SOUND, hostname="node-b", network="machine-b/1", resolved="192.0.2.2")

HEALTH = Health(driver="580.1", used=500 * 2**20, memory_errors=0, slowed=())
GPU = Gpu(name="NVIDIA H200", memory=140 * 2**30, health=HEALTH)
GPUS = Hardware(
    cores=32, memory=10**12, gpus=(GPU,) * 8, listed=8, torch="2.13.0+cu128", visible=None
)
NO_GPUS = replace(GPUS, gpus=(), listed=0)

DISK = Disk(
    path="/runs",
    kind="nfs4",
    total=10**13,
    free=5 * 10**12,
    free_inodes=10**8,
    tested=256_000_000,
    write=1.2e9,
    read=2.4e9,
    trouble=None,
    rename=None,
)

CLUSTER = Cluster(
    name="pair", nodes=2, gpus_per_node=8, inter_node_gbit=400.0, gpu_memory_gib=140.0
)

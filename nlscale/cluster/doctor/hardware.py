"""Cores, memory and GPUs: as many as there are ranks, alike on all nodes, free and healthy."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nlscale.cluster.doctor.findings import Finding, Grade, merged, plural
from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes

_MIB, _GIB = 2**20, 2**30
_SMI_SECONDS = 30.0
_SMI_FIELDS = (
    "uuid",
    "driver_version",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
# nvml.h, nvmlClocksThrottleReasons: what heat or power supply cause, not what idling does.
_SLOWED = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power supply"}
_IN_USE = 0.02  # of a GPU's memory: a driver alone holds less
_AS_PLANNED = 0.95  # of the memory a cluster file promises


@dataclass(frozen=True)
class Health:
    """What nvidia-smi says of one GPU; None: it does not know."""

    driver: str
    used: int | None
    """Bytes, of all processes."""
    memory_errors: int | None
    """Uncorrected, since the driver was loaded."""
    slowed: tuple[str, ...]
    """Why its clock is held down."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory: int
    """Bytes."""
    health: Health | None
    """None without nvidia-smi."""


@dataclass(frozen=True)
class Hardware:
    """What one host computes with."""

    cores: int
    memory: int
    """Bytes of the host."""
    gpus: tuple[Gpu, ...]
    listed: int
    """GPUs that nvidia-smi lists, whether torch can use them or not."""
    torch: str
    """Its version, which names what it was built for."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Hardware:
        """Back from `dataclasses.asdict` and JSON."""
        gpus = []
        for gpu in plain["gpus"]:
            health = gpu["health"]
            if health is not None:
                health = Health(**{**health, "slowed": tuple(health["slowed"])})
            gpus.append(Gpu(**{**gpu, "health": health}))
        return cls(**{**plain, "gpus": tuple(gpus)})

    @property
    def driver(self) -> str | None:
        """Version of the GPUs' driver."""
        return next((gpu.health.driver for gpu in self.gpus if gpu.health), None)


def probe() -> Hardware:
    """Ask the kernel, nvidia-smi and torch."""
    health = parse_smi(_smi())  # first: what torch itself holds is no use by others
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        uuid = str(found.uuid).removeprefix("GPU-")
        gpus.append(Gpu(found.name, found.total_memory, health.get(f"GPU-{uuid}")))
    return Hardware(
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(gpus),
        listed=len(health),
        torch=torch.__version__,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def parse_smi(text: str) -> dict[str, Health]:
    """Health by UUID, from what `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` says."""
    found = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(_SMI_FIELDS):
            continue
        uuid, driver, used, errors, reasons = row
        mask = int(reasons, 16) if reasons.startswith("0x") else 0
        found[uuid] = Health(
            driver=driver,
            used=int(used) * _MIB if used.isdigit() else None,
            memory_errors=int(errors) if errors.isdigit() else None,
            slowed=tuple(dict.fromkeys(why for bit, why in _SLOWED.items() if mask & bit)),
        )
    return found


def judge(
    found: dict[str, Hardware], ranks: int | None, cluster: Cluster | None = None
) -> list[Finding]:
    """Whether the GPUs are enough, usable, alike, free and healthy.

    Args:
        found: by host.
        ranks: that run on each host; None: not known yet.
        cluster: what the nodes are said to be.
    """
    findings = [_count(host, hardware, ranks) for host, hardware in found.items()]
    findings += _alike(found)
    for host, hardware in found.items():
        findings += _healthy(host, hardware)
        if cluster is not None:
            findings += _as_planned(host, hardware, cluster)
    return merged(findings, found)


def _count(host: str, hardware: Hardware, ranks: int | None) -> Finding:
    check, on, gpus = "GPUs", (host,), hardware.gpus
    if not gpus and hardware.listed:
        built = "is built for the CPU" if hardware.torch.endswith("+cpu") else "can use none"
        advice = (
            "CUDA_VISIBLE_DEVICES hides them; unset it"
            if hardware.visible is not None and not hardware.torch.endswith("+cpu")
            else "install a build of torch for the CUDA version that nvidia-smi shows"
        )
        measured = (
            f"nvidia-smi lists {hardware.listed}, but torch {hardware.torch} {built}: training "
            f"runs on the CPU"
        )
        return Finding(check, Grade.warning, measured, advice, on)
    if not gpus:
        measured = (
            f"no GPU: training runs on the CPU with gloo ({plural(hardware.cores, 'core')}, "
            f"{human_bytes(hardware.memory)} of memory)"
        )
        return Finding(check, Grade.note, measured, hosts=on)
    kinds = Counter((gpu.name, gpu.memory) for gpu in gpus)
    measured = ", ".join(
        f"{count} x {name}, {memory / _GIB:.0f} GiB" for (name, memory), count in kinds.items()
    )
    if ranks is None or len(gpus) == ranks:
        return Finding(check, Grade.ok, measured, hosts=on)
    measured += f"; {plural(ranks, 'rank')} on this host"
    if len(gpus) < ranks:
        advice = f"every rank needs a GPU of its own: start {len(gpus)} ranks a node"
        if hardware.listed > len(gpus):
            advice += f", or show them the {hardware.listed} that nvidia-smi lists"
        return Finding(check, Grade.error, measured, advice, on)
    return Finding(
        check, Grade.note, measured, f"{len(gpus) - ranks} idle; one rank a GPU uses all", on
    )


def _alike(found: dict[str, Hardware]) -> list[Finding]:
    """Of several nodes: all with GPUs or none, and all of one kind."""
    kinds = {host: Counter(gpu.name for gpu in hardware.gpus) for host, hardware in found.items()}
    usual = Counter(frozenset(kind.items()) for kind in kinds.values()).most_common(1)[0][0]
    findings = []
    for host, kind in kinds.items():
        if frozenset(kind.items()) == usual:
            continue
        mixed = bool(kind) != bool(usual)
        findings.append(
            Finding(
                "GPUs alike",
                Grade.error if mixed else Grade.warning,
                f"{_named(kind.items())}, the other nodes {_named(usual)}",
                "ranks with and without a GPU cannot talk: see its driver, or leave the node out"
                if mixed
                else "every step waits for the slowest GPU: use nodes of one kind",
                (host,),
            )
        )
    return findings


def _healthy(host: str, hardware: Hardware) -> list[Finding]:
    findings = []
    for number, gpu in enumerate(hardware.gpus):
        if gpu.health is None:
            continue
        seen: list[tuple[str, str]] = []
        if (gpu.health.used or 0) > _IN_USE * gpu.memory:
            used = human_bytes(gpu.health.used or 0)
            seen.append((f"{used} in use by others", "`nvidia-smi` names the processes; end them"))
        if gpu.health.memory_errors:
            count = plural(gpu.health.memory_errors, "uncorrected memory error")
            seen.append((count, "`nvidia-smi --gpu-reset` when idle; if they recur, replace it"))
        if gpu.health.slowed:
            why = " and ".join(gpu.health.slowed)
            seen.append((f"its clock is held down by {why}", "see cooling and power of the node"))
        for measured, advice in seen:
            findings.append(
                Finding("GPU health", Grade.warning, f"GPU {number}: {measured}", advice, (host,))
            )
    return findings


def _as_planned(host: str, hardware: Hardware, cluster: Cluster) -> list[Finding]:
    """Where the cluster file promises more than there is. Without GPUs it is an emulated one."""
    check, on, gpus = "cluster file", (host,), hardware.gpus
    least = min((gpu.memory / _GIB for gpu in gpus), default=cluster.gpu_memory_gib)
    findings = []
    if gpus and len(gpus) != cluster.gpus_per_node:
        measured = f"{cluster.name} has {cluster.gpus_per_node} GPUs a node, here are {len(gpus)}"
        findings.append(Finding(check, Grade.warning, measured, "correct gpus_per_node", on))
    if least < _AS_PLANNED * cluster.gpu_memory_gib:
        measured = (
            f"{cluster.name} has GPUs of {cluster.gpu_memory_gib:g} GiB, here is one of {least:.1f}"
        )
        findings.append(Finding(check, Grade.warning, measured, "correct gpu_memory_gib", on))
    return findings


def _named(kinds: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(kinds)) or "no GPU"


def _smi() -> str:
    """What nvidia-smi says; nothing where there is none, or no driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = [f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=_SMI_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""

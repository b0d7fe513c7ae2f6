"""What surrounds the process: limits, threads, names and addresses. Looked at before connecting."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.doctor.findings import Finding, Grade, merged, plural
from nlscale.cluster.life import open_files
from nlscale.config.units import human_bytes

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SHARED_MEMORY = 512_000_000  # bytes; a container has 64 MB unless told otherwise
_GLOO = "gloo address"
_VIRTUAL = ("lo", "docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "tunl")


@dataclass(frozen=True)
class Environment:
    """What one process sees of its machine."""

    hostname: str
    network: str
    """Names the network stack: processes that share it reach each other over the loopback."""
    resolved: str | None
    """What the hostname resolves to; None: it does not."""
    usable: bool
    """Whether that is an address of this machine."""
    interfaces: dict[str, str]
    """IPv4 address by interface; empty where it has none."""
    gloo_interface: str | None
    """GLOO_SOCKET_IFNAME."""
    nccl_interface: str | None
    """NCCL_SOCKET_IFNAME."""
    open_files: int
    """Soft limit of open files."""
    most_open_files: int
    """Hard limit of open files."""
    shared_memory: int | None
    """Bytes of /dev/shm; None: there is none."""
    threads: int | None
    """OMP_NUM_THREADS."""
    cores: int
    """Of the machine."""
    own_cores: int
    """That this process may use."""


def probe() -> Environment:
    """Look around; connects to nothing."""
    hostname = socket.gethostname()
    resolved, usable = _resolve_own(hostname)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Environment(
        hostname=hostname,
        network=_network(),
        resolved=resolved,
        usable=usable,
        interfaces={name: _address(name) for _, name in socket.if_nameindex()},
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME") or None,
        nccl_interface=os.environ.get("NCCL_SOCKET_IFNAME") or None,
        open_files=soft,
        most_open_files=hard,
        shared_memory=_size("/dev/shm"),
        threads=int(threads) if threads.isdigit() else None,
        cores=os.cpu_count() or 1,
        own_cores=len(os.sched_getaffinity(0)),
    )


def judge_limits(
    seen: dict[str, Environment], ranks: int = 1, ranks_per_node: int = 1
) -> list[Finding]:
    """Open files, shared memory and threads.

    Args:
        seen: by host.
        ranks: of the run.
        ranks_per_node: of the run.
    """
    findings = []
    for host, around in seen.items():
        findings += [
            _open_files(host, around, ranks),
            _shared_memory(host, around),
            _threads(host, around, ranks_per_node),
        ]
    return merged(sorted(findings, key=lambda finding: finding.check), seen)


def judge_addresses(seen: dict[str, Environment]) -> list[Finding]:
    """Whether other hosts can reach the address at which gloo will listen, and NCCL has one.

    Args:
        seen: by host; of one machine, one.
    """
    several = len({around.network for around in seen.values()}) > 1
    alone = len(seen) == 1
    findings = [_gloo_address(host, around, several, alone) for host, around in seen.items()]
    fine = [finding for finding in findings if finding.grade == Grade.ok]
    if len({finding.measured for finding in fine}) > 1:
        hosts = tuple(host for finding in fine for host in finding.hosts)
        one = Finding(_GLOO, Grade.ok, "each node has an address of its own", hosts=hosts)
        findings = [one, *(finding for finding in findings if finding not in fine)]
    for host, around in seen.items():
        if around.nccl_interface and not _nccl_matches(around.nccl_interface, around.interfaces):
            findings.append(
                Finding(
                    "NCCL interface",
                    Grade.error,
                    f"NCCL_SOCKET_IFNAME={around.nccl_interface} matches no interface",
                    _choose("NCCL_SOCKET_IFNAME", around, alone),
                    (host,),
                )
            )
    return merged(findings, seen)


def _open_files(host: str, around: Environment, ranks: int) -> Finding:
    hard, wanted = around.most_open_files, open_files.needed(ranks, store=True)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        limit = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,}"
        if around.open_files != hard:
            limit += f" (a shell has {around.open_files:,}; a run raises it by itself)"
        return Finding("open files", Grade.ok, limit, hosts=(host,))
    return Finding(
        "open files",
        Grade.error,
        f"at most {hard:,}; the first of {plural(ranks, 'rank')} needs {wanted:,}",
        f"raise the hard limit: {open_files.how_to_raise(wanted)}",
        (host,),
    )


def _shared_memory(host: str, around: Environment) -> Finding:
    size = around.shared_memory
    if size is not None and size >= _SHARED_MEMORY:
        return Finding("shared memory", Grade.ok, f"/dev/shm of {human_bytes(size)}", hosts=(host,))
    return Finding(
        "shared memory",
        Grade.warning,
        "no /dev/shm" if size is None else f"/dev/shm of only {human_bytes(size)}",
        "NCCL passes data between the GPUs of a node through it; start the container with "
        "--shm-size=8g or --ipc=host, or mount a tmpfs there",
        (host,),
    )


def _threads(host: str, around: Environment, ranks_per_node: int) -> Finding:
    threads = around.threads or around.own_cores
    said = f"OMP_NUM_THREADS={around.threads}" if around.threads else "OMP_NUM_THREADS not set"
    fair = max(1, around.cores // ranks_per_node)
    on = f"{plural(ranks_per_node, 'rank')} on {plural(around.cores, 'core')}"
    if around.own_cores < fair:
        return Finding(
            "threads",
            Grade.warning,
            f"a rank may use {around.own_cores} of {plural(around.cores, 'core')}, "
            f"its share is {fair}",
            f"give it more: srun --cpus-per-task={fair}, or the container's CPU limit",
            (host,),
        )
    if threads * ranks_per_node > around.cores and threads > 1:
        return Finding(
            "threads",
            Grade.warning,
            f"{said}: {threads} threads each, {on}",
            f"export OMP_NUM_THREADS={fair}, so that ranks do not push each other aside",
            (host,),
        )
    return Finding("threads", Grade.ok, f"{said}, {on}", hosts=(host,))


def _gloo_address(host: str, around: Environment, several: bool, alone: bool) -> Finding:
    named, choose = around.gloo_interface, _choose("GLOO_SOCKET_IFNAME", around, alone)
    if named:
        unknown = [name for name in named.split(",") if name not in around.interfaces]
        if unknown:
            measured = f"GLOO_SOCKET_IFNAME={named}, but there is no interface {', '.join(unknown)}"
            return Finding(_GLOO, Grade.error, measured, choose, (host,))
        address = around.interfaces[named.split(",")[0]]
        measured = f"{address or 'no IPv4 address'} (GLOO_SOCKET_IFNAME={named})"
    elif around.resolved is None:
        address, measured = "127.0.0.1", "the hostname does not resolve"
    elif not around.usable:
        address = "127.0.0.1"
        measured = f"the hostname resolves to {around.resolved}, no address of this machine"
    else:
        address, measured = around.resolved, f"the hostname resolves to {around.resolved}"
    if not _is_loopback(address):
        return Finding(_GLOO, Grade.ok, measured, hosts=(host,))
    if several:
        measured += ": gloo would listen on the loopback, where no other node can connect"
        return Finding(_GLOO, Grade.error, measured, choose, (host,))
    if not alone:
        return Finding(_GLOO, Grade.ok, f"{measured}, and all ranks are there", hosts=(host,))
    advice = f"enough for one machine; for several, {choose}"
    return Finding(_GLOO, Grade.note, measured, advice, (host,))


def _choose(variable: str, around: Environment, alone: bool) -> str:
    """The advice to name an interface, with those that could be meant.

    Where there are several hosts, without addresses: what is true of all is then said once.
    """
    real = {
        name: address
        for name, address in around.interfaces.items()
        if address and not name.startswith(_VIRTUAL)
    }
    names = ", ".join(f"{name} ({where})" if alone else name for name, where in real.items())
    if not real:
        return f"no interface but the loopback has an IPv4 address; once one has, set {variable}"
    return f"set {variable} to the interface that joins the nodes: {names}"


def _nccl_matches(pattern: str, interfaces: dict[str, str]) -> bool:
    """Whether NCCL finds an interface: by prefixes, exact names (`=`), or all but some (`^`)."""
    names = [name for name in interfaces if name != "lo"] or list(interfaces)
    leave_out = pattern.startswith("^")
    pattern = pattern.removeprefix("^")
    exact = pattern.startswith("=")
    parts = [part for part in pattern.removeprefix("=").split(",") if part]

    def listed(name: str) -> bool:
        return any(name == part if exact else name.startswith(part) for part in parts)

    if leave_out:
        return any(not listed(name) for name in names)
    return any(listed(name) for name in interfaces)


def _is_loopback(address: str) -> bool:
    # an interface without an IPv4 address may have an IPv6 one: only what is known is judged
    return bool(address) and ipaddress.ip_address(address.split("%")[0]).is_loopback


def _network() -> str:
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{machine}/{os.stat('/proc/self/ns/net').st_ino}"


def _resolve_own(hostname: str) -> tuple[str | None, bool]:
    """What the hostname resolves to as gloo reads it, and whether one can listen there."""
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return None, False
    for family, *_, where in found:
        with socket.socket(family, socket.SOCK_STREAM) as probing, contextlib.suppress(OSError):
            probing.bind((where[0], 0))
            return str(where[0]), True
    return str(found[0][4][0]), False


def _address(interface: str) -> str:
    """The IPv4 address of an interface, or nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _size(path: str) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize

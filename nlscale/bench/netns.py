"""Nodes emulated on one machine: a network namespace each, joined by a switch.

    node 0 [ link0 ] --- tbf --- [ switch ] --- tbf --- [ link0 ] node 1

A node is a namespace with one link, limited by `tc ... tbf` to the rate at which it may send; the
switch is a bridge in a namespace of its own. Nothing is added to the machine's own network, and
the addresses exist only in here. What the ranks of one node say to each other stays on its `lo`,
so what the link counts is what crosses between nodes, headers included.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from nlscale.errors import UserError

LINK = "link0"
_PREFIX = "nlscale-"
_CLONE_NEWNET = 0x40000000
_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
# A burst above the largest packet the kernel hands over (64 KiB), a queue that never drops.
_BUCKET = ("burst", "128kb", "limit", "16mb")


class EmulatedNodes:
    """Nodes that exist inside a `with`; they go when it ends, by whatever way Python can see.

    Namespaces are named after this process. Those left behind by one that was killed are removed
    when the next one starts.
    """

    def __init__(self, count: int, rate: str | None = "200mbit") -> None:
        """Check what is needed.

        Args:
            count: nodes, at most 250.
            rate: what a node can send: a number and kbit, mbit or gbit (a second); None: no limit.

        Raises:
            UserError: not root, no ip or tc, or not a rate.
        """
        self.count, self.rate, self.bits_per_second = count, rate, math.inf
        if rate is not None:
            match = _RATE.fullmatch(rate)
            if match is None or float(match[1]) <= 0:
                raise UserError(f"--rate {rate!r} is not a rate; write for example 200mbit")
            self.bits_per_second = float(match[1]) * _UNITS[match[2]]
        if not 1 <= count <= 250:
            raise UserError(f"{count} nodes cannot be emulated; use 1 to 250")
        check_tools()
        self._prefix = f"{_PREFIX}{os.getpid()}-"
        self._old_handler: Any = None

    def __enter__(self) -> EmulatedNodes:
        remove_leftovers()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, _end_as_if_interrupted)
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in _namespaces(self._prefix):
            _ip("netns", "del", name, check=False)
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None

    def address(self, node: int) -> str:
        """The IPv4 address of a node, known only to the others."""
        return f"10.77.0.{node + 1}"

    def command(self, node: int, *command: str) -> list[str]:
        """That command, to be run on a node."""
        return ["ip", "netns", "exec", self._name(node), *command]

    def set_link(self, node: int, up: bool) -> None:
        """Cut a node off from the others, or join it again."""
        _ip("-n", self._name(node), "link", "set", LINK, "up" if up else "down")

    def enter(self, node: int) -> None:
        """Move the calling process to a node, for good.

        Only the calling thread moves: call it before anything starts others.
        """
        # os.setns exists only from Python 3.12 on.
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/var/run/netns/{self._name(node)}", os.O_RDONLY)
        try:
            if libc.setns(fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self._name(node)}")
        finally:
            os.close(fd)

    def _name(self, node: int) -> str:
        return f"{self._prefix}node{node}"

    def _build(self) -> None:
        switch = f"{self._prefix}switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for node in range(self.count):
            name, port = self._name(node), f"port{node}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", LINK, "type", "veth", "peer", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if self.rate is None:
                continue
            limit = ("qdisc", "add", "dev", LINK, "root", "tbf", "rate", self.rate, *_BUCKET)
            _run("tc", "-n", name, *limit)


def sent_bytes(interface: str = LINK) -> int:
    """Bytes an interface of the calling process's node has sent, headers included.

    The kernel's counter, the one that /sys/class/net shows to processes born in the namespace;
    /proc shows it to those that moved there too.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise OSError(f"no interface {interface} here")


def remove_leftovers() -> None:
    """Remove the nodes of processes that are no more."""
    for name in _namespaces(_PREFIX):
        owner = re.match(rf"{_PREFIX}(\d+)-", name)
        if owner and not is_alive(owner[1]):
            _ip("netns", "del", name, check=False)


def is_alive(pid: str) -> bool:
    """Whether there is a process of that number."""
    return Path(f"/proc/{pid}").exists()


def check_tools() -> None:
    """Whether nodes can be emulated here.

    Raises:
        UserError: what is missing and how to get it.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found; install iproute2 (apt-get install iproute2, "
            f"or dnf install iproute-tc)"
        )
    if os.geteuid() != 0:
        raise UserError("emulated nodes need root, for network namespaces; run it with sudo")


def _namespaces(prefix: str) -> list[str]:
    lines = _ip("netns", "list").splitlines()
    return [line.split()[0] for line in lines if line.startswith(prefix)]


def _ip(*arguments: str, check: bool = True) -> str:
    return _run("ip", *arguments, check=check)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise UserError(
            f"this machine cannot emulate nodes: `{' '.join(command)}` says "
            f"{' '.join(done.stderr.split()) or done.returncode}"
        )
    return done.stdout


def _end_as_if_interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

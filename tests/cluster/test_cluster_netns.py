"""Emulated nodes: built, counted, limited, and gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nlscale.bench.netns import EmulatedNodes, check_tools, remove_leftovers, sent_bytes
from nlscale.errors import UserError

MEGABYTE = 1_000_000


def namespaces(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.startswith(f"nlscale-{pid}-")]


def on_node(nodes: EmulatedNodes, node: int, work: Callable[[], None]) -> int:
    """Run `work` in a process on a node; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nodes.enter(node)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.root
def test_what_leaves_a_node_is_counted_and_limited(tmp_path: Path) -> None:
    interfaces = sorted(os.listdir("/sys/class/net"))
    with EmulatedNodes(2, "80mbit") as nodes:
        assert len(namespaces(os.getpid())) == 3  # and the switch
        assert sorted(os.listdir("/sys/class/net")) == interfaces

        def receive() -> None:
            with socket.create_server((nodes.address(1), 5000)) as server:
                (tmp_path / "listening").touch()
                peer, _ = server.accept()
                with peer:
                    while peer.recv(1 << 16):
                        pass

        def send() -> None:
            before, started = sent_bytes(), time.monotonic()
            with socket.create_connection((nodes.address(1), 5000)) as peer:
                peer.sendall(bytes(4 * MEGABYTE))
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1)  # until the other end has read all
            seconds = time.monotonic() - started
            (tmp_path / "sent").write_text(f"{sent_bytes() - before} {seconds}")

        receiver = on_node(nodes, 1, receive)
        while not (tmp_path / "listening").exists():
            time.sleep(0.01)
        for pid in (on_node(nodes, 0, send), receiver):
            assert os.waitpid(pid, 0)[1] == 0
    sent, seconds = map(float, (tmp_path / "sent").read_text().split())
    assert 1.0 < sent / (4 * MEGABYTE) < 1.05
    assert seconds > 0.9 * 4 * MEGABYTE * 8 / 80e6  # the bucket lets a little through at once
    assert namespaces(os.getpid()) == []


@pytest.mark.root
def test_nodes_go_when_the_work_fails() -> None:
    with pytest.raises(ZeroDivisionError), EmulatedNodes(2):
        raise ZeroDivisionError
    assert namespaces(os.getpid()) == []


@pytest.mark.root
def test_nodes_of_a_process_that_is_no_more_are_removed() -> None:
    check_tools()
    gone = subprocess.Popen(["true"])
    gone.wait()
    subprocess.run(["ip", "netns", "add", f"nlscale-{gone.pid}-node0"], check=True)
    with EmulatedNodes(2):
        assert namespaces(gone.pid) == []
        remove_leftovers()
        assert len(namespaces(os.getpid())) == 3


def test_missing_tools_and_rights_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="ip and tc not found; install iproute2"):
            EmulatedNodes(2)
    for tool in ("ip", "tc"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="need root"):
        EmulatedNodes(2)


@pytest.mark.parametrize("rate", ["200", "fast", "0mbit", "200 mbit", "-1mbit"])
def test_a_wrong_rate_is_refused(rate: str) -> None:
    with pytest.raises(UserError, match="write for example 200mbit"):
        EmulatedNodes(2, rate)

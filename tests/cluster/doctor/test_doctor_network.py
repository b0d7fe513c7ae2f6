"""Bandwidth and addresses between emulated nodes, whose links have a known rate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doctors import findings

from nlscale.bench.netns import check_tools

pytestmark = pytest.mark.root
SCRIPT = Path(__file__).parent / "emulated.py"


@pytest.fixture(autouse=True)
def _tools() -> None:
    """Fails, and says what to install or that root is needed, instead of skipping."""
    check_tools()


def examine(path: Path, **asked: Any) -> tuple[int, str]:
    """Exit code and JSON report of a doctor on emulated nodes of 200 Mbit/s."""
    asked = {"nodes": 2, "ranks_per_node": 1, "rate": "200mbit", **asked}
    asked["arguments"] = ["--path", str(path), *asked.get("arguments", [])]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(asked)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    return done.returncode, done.stdout


def test_the_measured_bandwidth_is_that_of_the_links(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "{name: fast, nodes: 2, gpus_per_node: 2, inter_node_gbit: 1.0, gpu_memory_gib: 2}"
    )
    code, out = examine(tmp_path / "runs", ranks_per_node=2, arguments=["--cluster", str(cluster)])
    assert code == 0, "a slow network is a warning"
    measured = json.loads(out)["measured"]["network"]
    rates = [link["gbit"] for link in measured["links"]]
    assert len(rates) == 2 and all(0.12 < gbit < 0.23 for gbit in rates), rates
    for group in ("across", "everyone"):
        ranks, seconds = measured[group]["ranks"], measured[group]["seconds"]
        best = max(8e-9 * int(size) / spent for size, spent in seconds.items())
        assert 0.12 < best * 2 * (ranks - 1) / ranks < 0.23, (group, seconds)
    inside = [seen["seconds"]["4194304"] for seen in measured["within"].values()]
    assert max(inside) < measured["across"]["seconds"]["4194304"], "the loopback is not limited"
    (slow,) = findings(out)["across nodes"]
    assert slow["grade"] == "warning" and "fast has 1 Gbit/s" in slow["measured"]
    assert "GLOO_SOCKET_IFNAME" in slow["advice"]


def test_the_node_with_the_slow_link_is_named(tmp_path: Path) -> None:
    _, out = examine(tmp_path, nodes=3, slow={"2": "20mbit"})
    slow = findings(out)["slow host"]
    assert [one["grade"] for one in slow] == ["warning"]
    (host,) = slow[0]["hosts"]
    assert host.endswith("(node 2)") and slow[0]["measured"].startswith("sends only ")


def test_a_hostname_that_is_the_loopback_is_told_before_connecting(tmp_path: Path) -> None:
    code, out = examine(tmp_path, unset=["GLOO_SOCKET_IFNAME"])
    bad = findings(out)["gloo address"]
    assert code == 2 and [one["grade"] for one in bad] == ["error"], bad
    assert "gloo would listen on the loopback" in bad[0]["measured"]
    assert bad[0]["advice"].endswith(": link0") and bad[0]["hosts"] == []
    assert "latency" not in findings(out)

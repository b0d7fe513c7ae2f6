"""torchrun on two emulated nodes: the network between them goes down in the middle of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.test_train_run import records, small_data

from nlscale.bench.netns import LINK, EmulatedNodes, check_tools
from nlscale.checkpoint.store.store import Store

pytestmark = pytest.mark.root

SILENCE = 8
SMALL = ["model.layers=1", "model.d_model=32", "model.heads=1", "data.sequence_length=32"]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(autouse=True)
def _tools() -> None:
    """Fails, and says what to install or that root is needed, instead of skipping."""
    check_tools()


def start(nodes: EmulatedNodes, node: int, overrides: list[str]) -> subprocess.Popen[str]:
    """Start a node's ranks as its user would: the same script on each."""
    environment = {
        **ENVIRONMENT,
        "HEAD": f"{nodes.address(0)}:29500",
        "NODES": "2",
        "NODE_RANK": str(node),
        "RANKS": "1",
        "INTERFACE": LINK,
    }
    script = ["bash", "launch/torchrun/many-nodes.sh", "recipes/quickstart.yaml", *overrides]
    return subprocess.Popen(
        nodes.command(node, *script),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_cut_link_ends_both_nodes_with_a_reason_and_a_restart_goes_on(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    data, run = small_data(tmp_path / "text", documents=40, held_out=0.1), tmp_path / "run"
    overrides = [f"data.dir={data}", f"run.dir={run}", "train.steps=60", "checkpoint.every=5 steps"]
    overrides += [*SMALL, f"timeouts.silence={SILENCE}"]
    with EmulatedNodes(2, None) as nodes:
        both = [start(nodes, node, overrides) for node in (0, 1)]
        end = time.monotonic() + 120
        # saved in the background: many steps may have been taken until a checkpoint is whole
        while not any(run.glob("checkpoints/step-*[0-9]")) or len(records(run, "train")) < 8:
            assert time.monotonic() < end and all(node.poll() is None for node in both)
            time.sleep(0.05)
        nodes.set_link(1, up=False)
        cut = time.monotonic()
        outputs = [node.communicate(timeout=90)[0] for node in both]
        assert time.monotonic() - cut < SILENCE + 30  # torchrun's own ending included
        assert all(node.returncode != 0 for node in both)
        assert f"lost rank 1: nothing heard for {SILENCE} s" in outputs[0], outputs[0]
        assert f"cannot reach {nodes.address(0)}:29500" in outputs[1], outputs[1]
        for output in outputs:
            said = [line for line in output.splitlines() if line.startswith("nlscale: ")]
            assert len(said) == 1, said
        before = Store(run / "checkpoints").checkpoints()[-1].step
        assert before >= 5

        nodes.set_link(1, up=True)
        both = [start(nodes, node, overrides) for node in (0, 1)]
        outputs = [node.communicate(timeout=180)[0] for node in both]
        assert [node.returncode for node in both] == [0, 0], outputs
        assert f"resuming from {run}/checkpoints/step-{before:08d}" in outputs[0]
    assert [r["step"] for r in records(run, "train")] == list(range(1, 61))


def test_torchrun_recovers_from_a_killed_rank(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    data, run = small_data(tmp_path / "text", documents=40, held_out=0.1), tmp_path / "run"
    script = ["bash", "launch/torchrun/one-node.sh", "recipes/quickstart.yaml", f"run.dir={run}"]
    script += [f"data.dir={data}", "train.steps=40", *SMALL]
    torchrun = subprocess.Popen(
        [*script, "checkpoint.every=5 steps"],
        env={**ENVIRONMENT, "RANKS": "2", "RESTARTS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 120
    # saved in the background: many steps may have been taken until a checkpoint is whole
    while not any(run.glob("checkpoints/step-*[0-9]")) or len(records(run, "train")) < 8:
        assert time.monotonic() < end and torchrun.poll() is None
        time.sleep(0.05)
    with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as file:
        os.kill(int(file.read().split()[-1]), signal.SIGKILL)
    output = torchrun.communicate(timeout=180)[0]
    assert torchrun.returncode == 0, output
    assert "resuming from " in output
    assert [r["step"] for r in records(run, "train")] == list(range(1, 41))

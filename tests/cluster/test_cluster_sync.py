"""Bytes between emulated nodes are the plan's, and deferral changes nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nlscale.bench.netns import check_tools, remove_leftovers

pytestmark = pytest.mark.root

SMALL = ["model.layers=4", *(f"levels.spectrum.{i}.period={2**i}" for i in range(4))]
BENCH = [sys.executable, "-m", "nlscale", "bench", "sync"]


@pytest.fixture(autouse=True)
def _tools() -> None:
    """Fails, and says what to install or that root is needed, instead of skipping."""
    check_tools()


def test_bytes_are_the_plans_and_parameters_those_of_every_step() -> None:
    done = subprocess.run(
        [*BENCH, "--steps", "4", "--json", *SMALL, "levels.spectrum.3.period=4"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["nodes"], result["ranks_per_node"], result["steps"]) == (2, 2, 4)
    modes = {mode["mode"]: mode for mode in result["modes"]}
    assert list(modes) == [
        "every-step", "deferred", "every-step-staggered", "deferred-staggered",
        "every-step-overlapped", "deferred-overlapped",
    ]  # fmt: skip
    for mode in modes.values():
        assert 0.95 <= mode["ratio"] <= 1.10, mode
        assert mode["peak_bytes"] <= 1.05 * mode["planned_peak_bytes"], mode
    for name in ("deferred", "deferred-staggered", "every-step-overlapped", "deferred-overlapped"):
        assert modes[name]["max_relative_difference"] <= 2.5e-7
        assert modes[name]["ratio"] <= 1.03
        assert 0 < modes[name]["exposed_link_seconds"] < modes[name]["step_seconds"]
    assert modes["every-step"]["max_relative_difference"] == 0
    assert modes["every-step"]["step_time_ratio"] == 1
    assert (
        modes["deferred-staggered"]["planned_peak_bytes"] < modes["deferred"]["planned_peak_bytes"]
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_bench_that_is_ended_leaves_nothing_behind(how: signal.Signals) -> None:
    bench = subprocess.Popen(
        [*BENCH, *SMALL], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert bench.stderr is not None
    seen = []
    for line in bench.stderr:
        seen.append(line)
        if "step" in line:  # trains
            break
    else:
        pytest.fail("".join(seen))
    ranks = _children(bench.pid)
    assert len(ranks) == 4
    bench.send_signal(how)
    code = bench.wait(30)
    deadline = time.monotonic() + 10
    while any(map(_runs, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, ranks))
    if how == signal.SIGKILL:
        assert _namespaces(bench.pid)  # nobody was left to remove them
        remove_leftovers()  # what the next bench begins with
    else:
        assert code == 130
    assert not _namespaces(bench.pid)


def test_steps_that_cut_a_cycle_are_refused() -> None:
    done = subprocess.run([*BENCH, "--steps", "12", *SMALL], capture_output=True, text=True)
    assert done.returncode == 2
    assert "whole cycles of the periods, 8 steps; use 8 or 16" in done.stderr


def test_a_failing_rank_ends_the_bench_with_its_own_error() -> None:
    overrides = ["train.global_batch=8", "optimizer.learning_rate=1e30", "model.init_std=1e20"]
    done = subprocess.run([*BENCH, *SMALL, *overrides], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "was not finite; nothing was measured" in done.stderr
    assert "Traceback" not in done.stderr


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _namespaces(pid: int) -> list[str]:
    return [name for name in os.listdir("/var/run/netns") if name.startswith(f"nlscale-{pid}-")]

"""Loss against inter-node bytes: what runs would send, and what of it is efficient."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from scaling.run_folders import BATCH, SEQUENCE, VOCABULARY, finished_run

from nlscale.cli import main

NODES = 4
CLUSTER = (
    f"{{name: four, nodes: {NODES}, gpus_per_node: 2, inter_node_gbit: 100, gpu_memory_gib: 80}}"
)


class Room:
    """A folder of runs and a cluster file, and the command run on them."""

    printed = err = ""
    """What the last command said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.cluster, self.figure = folder / "cluster.yaml", folder / "new" / "bytes.png"
        self.cluster.write_text(CLUSTER)

    def fit(self, *arguments: str, of: Path | None = None, code: int = 0) -> str:
        """Standard output; where it ends with an error, that."""
        figure = ("--frontier", str(self.figure), "--cluster", str(self.cluster))
        runs = str(of or self.runs)
        return self.run("fit", runs, "--bootstraps=20", *figure, *arguments, code=code)

    def run(self, *arguments: str, code: int = 0) -> str:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(list(arguments))
        self.printed, self.err = out.getvalue(), err.getvalue()
        assert ended.value.code == code, self.err
        return self.err if code else self.printed

    def network(self, *arguments: str) -> dict[str, Any]:
        found = json.loads(self.fit("--json", *arguments))["network"]
        assert self.figure.read_bytes().startswith(b"\x89PNG")
        return found


def loss_of(parameters: int, tokens: int, slower: float = 0.0) -> float:
    return 1 + 300 / parameters**0.34 + 400 / tokens**0.3 + slower


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """Three sizes, three lengths, periods 1 and 1, 4, 16, of which the slow lose 0.01 nats."""
    room = Room(tmp_path_factory.mktemp("swept"))
    sizes, lengths, slower = (64, 96, 128), (100, 400, 1600), {"[1]": 0.0, "[1,4,16]": 0.01}
    for width, steps, levels in itertools.product(sizes, lengths, slower):
        loss = loss_of(width**2 * 48, steps * SEQUENCE * BATCH, slower[levels])
        shape = (f"model.d_model={width}", f"levels={levels}")
        finished_run(room.runs / f"{width}-{steps}-{levels}", steps, loss, *shape)
    return room


@pytest.fixture(scope="module")
def network(swept: Room) -> dict[str, Any]:
    return swept.network()


@pytest.fixture
def room(swept: Room, tmp_path: Path) -> Room:
    """The same runs, to be added to."""
    shutil.copytree(swept.runs, tmp_path / "runs")
    return Room(tmp_path)


def test_what_a_run_sends_follows_from_its_levels(network: dict[str, Any]) -> None:
    assert (network["cluster"], network["nodes"], len(network["runs"])) == ("four", NODES, 18)
    ring = 2 * (NODES - 1) / NODES * 4  # bytes a parameter
    for run in network["runs"]:
        summary = json.loads((Path(run["run"]) / "summary.json").read_text())
        levels = summary["levels"]
        a_step = sum(ring * level["parameters"] / level["period_steps"] for level in levels)
        assert run["periods"] == ", ".join(str(level["period_steps"]) for level in levels)
        assert run["bytes_per_token"] == pytest.approx(a_step / (SEQUENCE * BATCH))
        assert run["bytes"] == pytest.approx(run["bytes_per_token"] * summary["tokens"])


def test_it_is_what_the_plan_says(swept: Room, network: dict[str, Any]) -> None:
    for run in network["runs"][:2]:
        config = str(Path(run["run"]) / "config.yaml")
        vocabulary = f"model.vocabulary={VOCABULARY}"
        text = swept.run("plan", config, "--cluster", str(swept.cluster), "--json", vocabulary)
        plan = json.loads(text)
        a_token = plan["total"]["mean_bytes_per_step"] / plan["tokens_per_step"]
        assert run["bytes_per_token"] == pytest.approx(a_token)


def test_the_frontier_holds_what_no_run_betters(network: dict[str, Any]) -> None:
    runs = network["runs"]
    assert [run["bytes"] for run in runs] == sorted(run["bytes"] for run in runs)
    for run in runs:
        better = [o for o in runs if o["bytes"] <= run["bytes"] and o["loss"] < run["loss"]]
        assert run["efficient"] == (not better)
    assert 1 < sum(run["efficient"] for run in runs) < len(runs)


def test_other_parts_are_another_setting_of_the_same_periods(room: Room) -> None:
    parts = "levels=[1,4,{period: 16, parts: [cms, mixer]}]"
    finished_run(room.runs / "parts", 100, 9.0, "model.d_model=64", parts)
    savings = {saving["periods"]: saving for saving in room.network()["savings"]}
    assert list(savings) == ["1, 4, 16", "1 cms+embedding+head, 4 cms, 16 cms+mixer"]
    assert [len(saving["costs"]) for saving in savings.values()] == [9, 1]


def test_periods_are_compared_between_runs_that_are_alike_but_for_them(room: Room) -> None:
    # not a pair with any: no other run has its learning rate
    other = finished_run(room.runs / "other", 100, 9.0, "levels=[1]", "optimizer.learning_rate=0.1")
    (saving,) = room.network()["savings"]
    assert (saving["periods"], saving["reference"]) == ("1, 4, 16", "1")
    assert saving["costs"] == pytest.approx([0.01] * 9)
    assert saving["loss"] == pytest.approx(0.01)
    assert saving["standard_error"] == pytest.approx(0, abs=1e-9)
    slow = json.loads((room.runs / "64-100-[1,4,16]" / "summary.json").read_text())["levels"]
    sent = sum(level["parameters"] / level["period_steps"] for level in slow)
    assert saving["fewer"] == pytest.approx(other["parameters"] / sent, rel=0.05)
    text = room.fit()
    assert "Beside periods 1, at equal size and tokens:" in text and "+0.0100" in text
    assert str(room.figure) in text


def test_families_are_told_apart(room: Room) -> None:
    for index in range(9):
        width, steps = (64, 96, 128)[index % 3], (100, 400, 1600)[index // 3]
        kind = ("model.mixer=attention", f"model.d_model={width}", "levels=[1]")
        loss = loss_of(width**2 * 40, steps * SEQUENCE * BATCH)
        finished_run(room.runs / f"attention{index}", steps, loss, *kind)
    network = room.network("--by", "model.mixer")
    assert {run["family"] for run in network["runs"]} == {"hope", "attention"}
    # attention has no slower runs to be compared with
    assert len(network["savings"][0]["costs"]) == 9


def test_what_it_cannot_do_is_said_in_a_line(room: Room) -> None:
    csv = room.folder / "runs.csv"
    csv.write_text("N,D,loss\n" + "".join(f"{i}e8,{i}e9,3\n" for i in range(1, 10)))
    assert "does not say how its runs are configured; give folders" in room.fit(of=csv, code=2)
    room.cluster.write_text(CLUSTER.replace("nodes: 4", "nodes: 1"))
    assert "four is one node, nothing crosses the network" in room.fit(code=2)
    assert "--frontier and --cluster go together" in room.run(
        "fit", str(room.runs), "--cluster", str(room.cluster), code=2
    )
    room.cluster.write_text(CLUSTER)
    finished_run(room.runs / "odd", 100, 3.0, parameters=1_000_001)
    assert "counts 1000001 parameters, which its config.yaml does not give" in room.fit(code=2)
    assert room.err.count("\n") == 1

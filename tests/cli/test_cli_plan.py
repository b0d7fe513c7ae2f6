"""`nlscale plan`: the table, the JSON, the figure, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nlscale.cli import main
from nlscale.data.build import build

RECIPE = """
data: {dir: DATA, sequence_length: 32}
model: {layers: 4, d_model: 64, heads: 2, vocabulary: 100}
levels: [{name: fast}, {name: slow, period: 8 steps}]
train: {steps: 1000, global_batch: 8, micro_batch: 2}
"""
CLUSTER = "{name: pair, nodes: 2, gpus_per_node: 2, inter_node_gbit: 0.2, gpu_memory_gib: 2}"


class Room:
    """A folder with a recipe and a cluster file, and the command run in it."""

    printed = ""
    """Standard output of the last command."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.recipe, self.cluster = folder / "recipe.yaml", folder / "cluster.yaml"
        self.recipe.write_text(RECIPE.replace("DATA", str(folder / "data")))
        self.cluster.write_text(CLUSTER)

    def plan(self, *arguments: str, code: int = 0) -> str:
        """Standard output of a plan that ends well, else the error."""
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(self.recipe), "--cluster", str(self.cluster), *arguments])
        out, err = self._capsys.readouterr()
        self.printed = out
        assert ended.value.code == code, err
        assert code == 0 or err.count("\n") == 1
        return err if code else out

    def json(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.plan("--json", *arguments))


@pytest.fixture
def room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Room:
    return Room(tmp_path, capsys)


def test_json_keys_and_how_they_hang_together(room: Room) -> None:
    plan = room.json()
    assert set(plan) == {
        "cluster", "steps", "tokens", "stages", "run_seconds",
        "tokens_per_step", "flops_per_token", "flops_by_part", "cycle_steps",
        "staggered", "reduction", "levels", "total", "plain", "ratio",
        "exposure", "whole_matrices", "activation_bytes_per_step",
        "checkpoint", "shard_optimizer", "sharding", "memory", "fits", "pipeline",
        "host", "nvme", "serial_programs", "advice", "warnings",
    }  # fmt: skip
    assert set(plan["cluster"]) == {
        "name", "nodes", "gpus_per_node", "inter_node_gbit", "gpu_memory_gib"
    }  # fmt: skip
    assert set(plan["memory"]) == {"ranks", "fullest", "gpu_bytes", "usable_share"}
    assert set(plan["pipeline"]) == {
        "ranks", "virtual_stages", "micro_batches", "bubble", "imbalance"
    }  # fmt: skip
    assert set(plan["levels"][0]) == {
        "name", "parts", "local", "outer_every", "copy_rate", "parameters", "period_steps",
        "periods", "updates", "reductions",
        "mean_bytes_per_step", "run_bytes", "peak_bytes_aligned", "peak_bytes_staggered",
        "link_seconds_per_step",
    }  # fmt: skip
    assert set(plan["ratio"]) == {
        "plain_to_mean", "peak_aligned_to_plain", "peak_staggered_to_plain"
    }  # fmt: skip
    fast, slow = plan["levels"]
    assert (fast["period_steps"], slow["period_steps"]) == (1, 8)
    assert (fast["updates"], plan["cycle_steps"], plan["tokens_per_step"]) == (1000, 8, 256)
    assert plan["total"]["parameters"] == fast["parameters"] + slow["parameters"]
    assert plan["flops_per_token"] == sum(plan["flops_by_part"].values())
    assert set(plan["flops_by_part"]) == {"projections", "convolution", "memory", "levels", "head"}
    assert plan["plain"]["bytes_per_step"] == 4 * plan["total"]["parameters"]
    assert slow["mean_bytes_per_step"] == 4 * slow["parameters"] / 8
    # four blocks over a period of eight: one of them at a time
    assert slow["peak_bytes_staggered"] == slow["parameters"]
    assert plan["total"]["peak_bytes_aligned"] == plan["plain"]["bytes_per_step"]
    assert plan["ratio"]["plain_to_mean"] == pytest.approx(
        plan["plain"]["bytes_per_step"] / plan["total"]["mean_bytes_per_step"]
    )
    assert plan["plain"]["link_seconds_per_step"] == pytest.approx(
        plan["plain"]["bytes_per_step"] * 8 / 2e8
    )


def test_periods_that_change_are_planned_for_the_run(room: Room) -> None:
    steady = room.json()["levels"][1]
    assert steady["periods"] == [{"from_step": 1, "period_steps": 8}]
    # all blocks but the first have one update more, with which the end cuts a window short
    assert steady["reductions"] == steady["updates"] == 126
    periods = steady["run_bytes"] / (8 * steady["mean_bytes_per_step"])
    assert 125 < periods < 126
    plan = room.json("levels.period_warmup.steps=60%")
    slow = plan["levels"][1]
    assert [(p["from_step"], p["period_steps"]) for p in slow["periods"]] == [
        (1, 1), (201, 2), (401, 4), (601, 8)
    ]  # fmt: skip
    assert (slow["period_steps"], plan["cycle_steps"]) == (8, 1000)
    # a block updates at 200 steps, at 100, at 50 and at 50, give or take where the period changes
    assert 400 <= slow["updates"] == slow["reductions"] <= 403
    assert slow["run_bytes"] == pytest.approx(4 * slow["parameters"] * 400, rel=0.01)
    assert plan["total"]["peak_bytes_staggered"] == plan["plain"]["bytes_per_step"]
    said = room.plan("levels.period_warmup.steps=60%")
    assert "1 to 8" in said and "Periods change, and means are those of the run" in said
    bound = ["levels.period_warmup.critical_batch=[{from: 0, tokens: 1100 tokens}]"]
    bound += ["levels.period_warmup.share=1", "levels.period_warmup.steps=60%"]
    assert room.json(*bound)["levels"][1]["period_steps"] == 4, "the longest that it has"
    assert "1 to 4" in room.plan(*bound)
    every = room.json("levels.period_warmup.steps=60%", "levels.reduction=every-step")
    assert every["levels"][1]["reductions"] == 1000


def test_a_level_that_updates_rarely_is_warned_about(room: Room) -> None:
    plan = room.json("levels.stagger=false")
    assert plan["levels"][1]["updates"] == 125
    assert len(plan["warnings"]) == 1 and "'slow' makes 125 updates" in plan["warnings"][0]
    assert room.json("levels.stagger=false", "train.steps=1600")["warnings"] == []


def test_the_table_fits_a_terminal_and_names_every_level(room: Room) -> None:
    text = room.plan()
    assert "pair: 2 nodes of 2 GPUs" in text and "…" not in text
    table = [line for line in text.splitlines() if line.startswith(("fast", "slow", "plain"))]
    assert [line.split()[0] for line in table] == ["fast", "slow", "plain"]
    memory = [line for line in text.splitlines() if line.startswith(("memory", "GiB"))]
    assert memory[0].split()[1:] == [
        "weights", "gradients", "windows", "optimizer", "activations", "total", "of"
    ]  # fmt: skip
    assert len(memory[1].split()) == 8 and memory[1].split()[-1] == "2"
    assert max(map(len, [*table, *memory])) <= 80
    assert "this run sends what plain" in " ".join(room.plan("levels.reduction=every-step").split())


def test_on_one_node_nothing_crosses(room: Room) -> None:
    room.cluster.write_text(CLUSTER.replace("nodes: 2", "nodes: 1"))
    assert "One node: nothing crosses the network." in room.plan()
    plan = room.json()
    assert plan["total"]["mean_bytes_per_step"] == plan["plain"]["bytes_per_step"] == 0
    assert set(plan["ratio"].values()) == {None}
    assert "is one node" in room.plan("--figure", str(room.folder / "f.png"), code=2)


def test_stages_on_different_nodes_send_activations_only(room: Room) -> None:
    text = " ".join(room.plan("parallel.pipeline=2").split())
    assert "no gradient crosses the network" in text
    # 8 sequences of 32 tokens of 64 channels in bf16, there and back, over two nodes
    assert "Beside gradients, 32.8 kB of activations a step leave a node" in text
    assert "Pipeline of 2 ranks, 2 stages, 2 micro batches a step: a rank waits 33.3%" in text
    figure = ("--figure", str(room.folder / "f.png"))
    assert "each data-parallel group in a node" in room.plan("parallel.pipeline=2", *figure, code=2)


def test_a_run_that_does_not_fit_is_refused_after_its_plan_is_printed(room: Room) -> None:
    room.cluster.write_text(CLUSTER.replace("gib: 2", "gib: 0.0075"))
    too_large = ("data.sequence_length=256", "train.micro_batch=4", "train.global_batch=16")
    error = room.plan(*too_large, code=2)
    assert "GiB" in room.printed
    assert "does not fit pair: a GPU needs" in error and "most of it activations" in error
    assert "(90% of 0.0075)" in error
    plan = json.loads(room.plan("--json", *too_large, code=2) and room.printed)
    needed = plan["memory"]["ranks"][plan["memory"]["fullest"]]["total"]
    assert plan["fits"] is False and needed > 0.9 * plan["memory"]["gpu_bytes"]
    # what it says to use is enough
    better = error.split("; use ")[1].split()
    assert room.json(*too_large, *better)["fits"] is True
    assert room.json()["fits"] is True


def test_where_nothing_fits_it_says_so(room: Room) -> None:
    room.cluster.write_text(CLUSTER.replace("gib: 2", "gib: 1e-4"))
    assert "use more GPUs or a smaller model" in room.plan(code=2)


@pytest.mark.parametrize("levels", ["[1]", "[1,8]", "[1,7,501]"])
def test_the_figure_is_drawn(room: Room, levels: str) -> None:
    out = room.folder / "new" / "figure.png"
    assert str(out) in room.plan("--figure", str(out), f"levels={levels}")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_an_unknown_kind_is_refused(room: Room) -> None:
    assert "figure.what" in room.plan("--figure", str(room.folder / "figure.what"), code=2)


def test_the_vocabulary_comes_from_the_data(room: Room) -> None:
    assert "model.vocabulary=N" in room.plan("model.vocabulary=null", code=2)
    (room.folder / "in").mkdir()
    for i in range(2):
        (room.folder / "in" / f"{i}.txt").write_text(f"text {i}")
    build([str(room.folder / "in")], "bytes", room.folder / "data", held_out=0.5)
    index = json.loads((room.folder / "data" / "index.json").read_text())
    index |= {"vocabulary": 100, "separator": 99}
    (room.folder / "data" / "index.json").write_text(json.dumps(index))
    assert room.json("model.vocabulary=null") == room.json()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.tensor=3", "parallel.tensor 3 does not divide the 2 GPUs of a node"),
        ("parallel.tensor=4", "parallel.tensor 4 does not divide the 2 GPUs of a node"),
        ("train.global_batch=6", "train.global_batch 6 is not divisible"),
        ("parallel.ranks_per_node=4", "has 2 GPUs a node"),
        ("model.heads=3", "model.d_model 64 is not divisible by model.heads 3"),
        ("train.steps=0", "train.steps is 0"),
        ("model.vocabulary=101 parallel.tensor=2", "model.vocabulary 101 is not divisible"),
    ],
)
def test_what_does_not_fit_the_cluster_is_named(room: Room, override: str, says: str) -> None:
    assert says in room.plan(*override.split(), code=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CLUSTER.replace("nodes:", "node:", 1), "unknown key 'node'; did you mean 'nodes'?"),
        (CLUSTER.replace("inter_node_gbit", "inter_node_gbits"), "'inter_node_gbit'?"),
        (CLUSTER.replace("}", ", zzzz: 1}"), "the keys are name, nodes"),
        ("{name: pair, nodes: 2}", "gpus_per_node, inter_node_gbit, gpu_memory_gib not set"),
        (CLUSTER.replace("nodes: 2", "nodes: many"), "nodes: 'many' is not a whole number"),
        (CLUSTER.replace("0.2", "fast"), "inter_node_gbit: 'fast' is not a number"),
        (CLUSTER.replace("nodes: 2", "nodes: 0"), "nodes is 0; it must be above 0"),
        (CLUSTER.replace("0.2", ".nan"), "inter_node_gbit is nan"),
        (CLUSTER.replace(", gpu_memory_gib: 2", ""), "gpu_memory_gib not set"),
        (CLUSTER.replace("gib: 2", "gib: 0"), "gpu_memory_gib is 0.0; it must be above 0"),
        (CLUSTER.replace("gib: 2", "gib: big"), "gpu_memory_gib: 'big' is not a number"),
        ("- 1", "a cluster is a mapping"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_cluster_file_is_explained(room: Room, text: str, says: str) -> None:
    room.cluster.write_text(text)
    assert says in room.plan(code=2)


def test_a_missing_cluster_file_names_those_that_are_there(room: Room) -> None:
    room.cluster.unlink()
    said = room.plan(code=2)
    assert f"no cluster file at {room.cluster}; " in said and "two-nodes-16-gpus" in said


def test_planning_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys, nlscale.cli.plan, nlscale.plan.tables, nlscale.plan.figure, "
        "nlscale.plan.advice, nlscale.model.flops; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_checkpoint_is_planned(room: Room) -> None:
    plan = room.json()
    slow = plan["levels"][1]["parameters"]
    size = 12 * plan["total"]["parameters"] + 4 * slow
    assert plan["checkpoint"] == {
        "bytes": size,
        "inter_node_bytes": pytest.approx(4 * slow),  # a ring over two nodes sends it once
        "host_bytes": size / 2,
        "largest_file_bytes": size / 4,
        "files": 4,
        "resume_bytes": size,
    }
    for key in ("checkpoint.pending=exact", "levels.reduction=every-step"):
        assert room.json(key)["checkpoint"]["inter_node_bytes"] == 0


def test_host_memory_has_a_line_and_changes_what_is_largest(room: Room) -> None:
    assert "In host memory" not in room.plan()
    text = room.plan("levels.spectrum.1.memory=host", "tiers.ring_mib=1")
    assert "In host memory: state of slow" in text and "waits" in text
    keys = ("--largest", "tiers.ring_mib=1")
    found = room.json(*keys)
    assert found["hbm"]["parameters"] < found["host"]["parameters"]
    assert f"{found['host']['layers']} layers" in room.plan(*keys).splitlines()[1]
    assert "leave --figure out" in room.plan(*keys, "--figure", "a.png", code=2)


def test_a_node_without_the_memory_is_refused_in_one_line(room: Room) -> None:
    room.cluster.write_text(CLUSTER.replace("}", ", host_memory_gib: 0.0001}"))
    assert "(host_memory_gib)" in room.plan("levels.spectrum.1.memory=host", code=2)

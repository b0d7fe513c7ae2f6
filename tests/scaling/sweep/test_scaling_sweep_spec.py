"""What a sweep file gives: its runs, what they cost, and what is refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scaling.sweeps import WSD, write_sweep

from nlscale.cli import main
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.model.flops import flops_per_token
from nlscale.model.sizes import level_parameters
from nlscale.scaling.sweep.branches import share_stable_phases
from nlscale.scaling.sweep.ladder import Ladder
from nlscale.scaling.sweep.local import in_order
from nlscale.scaling.sweep.runs import expand
from nlscale.scaling.sweep.spec import read_sweep

ROOT = Path(__file__).parents[3]
VOCABULARY = {"model.vocabulary": 64}


class Room:
    """A folder with a sweep file in it, and the command run on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def write(self, axes: dict[str, Any], **more: Any) -> Path:
        """A sweep that needs no data to be listed."""
        more["set"] = VOCABULARY | more.get("set", {})
        return write_sweep(self.folder, "data/nowhere", axes, **more)

    def list(self, sweep: Path | str, *arguments: str, code: int = 0) -> str:
        """Standard output of a dry run that ends well, else its error."""
        with pytest.raises(SystemExit) as ended:
            main(["sweep", str(sweep), "--dry-run", *arguments])
        out, error = self._capsys.readouterr()
        assert ended.value.code == code, error
        return error if code else out

    def json(self, sweep: Path | str, *arguments: str) -> dict[str, Any]:
        return json.loads(self.list(sweep, "--json", *arguments))

    def refused(self, axes: Any, **more: Any) -> str:
        """The one line that a sweep file ends with, which names it."""
        said = self.list(self.write(axes, **more), code=2)
        assert said.count("\n") == 1 and str(self.folder / "sweep.yaml") in said
        return said


@pytest.fixture
def room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Room:
    return Room(tmp_path, capsys)


def test_runs_are_all_combinations_with_the_keys_of_their_values(room: Room) -> None:
    axes = {
        "model.mixer": ["hope", "attention"],
        "size": {
            "small": {"model.d_model": 32, "model.layers": 1},
            "large": {"model": {"d_model": 64, "layers": 3}, "optimizer.learning_rate": 1e-3},
        },
        "levels": [[1], [1, 4]],
        "run.seed": [1, 2],
        "tokens": {"per_parameter": [0.5, 2]},
    }
    found = room.json(room.write(axes))["runs"]
    assert len(found) == 2 * 2 * 2 * 2 * 2
    run = next(r for r in found if r["name"] == "attention-large-levels.1.4-seed2-2x")
    assert run["axes"]["size"] == "large" and run["state"] == "to do"
    config = recipe.load(
        room.folder / "recipe.yaml",
        ["model.mixer=attention", "model.d_model=64", "model.layers=3", "levels=[1,4]"],
    ).config
    assert run["parameters"] == sum(level_parameters(config, 64))
    assert run["non_embedding_parameters"] == run["parameters"] - 64 * 64
    assert run["steps"] == round(2 * run["parameters"] / (8 * 16))
    assert run["tokens"] == run["steps"] * 8 * 16
    assert run["flops"] == pytest.approx(flops_per_token(config, 64) * run["tokens"])
    halves = [r for r in found if r["name"].endswith("0.5x")]
    assert len(halves) == 16 and all(r["tokens"] < 0.6 * r["parameters"] for r in halves)


def test_a_ladder_comes_near_its_targets_at_one_shape(room: Room) -> None:
    axes = {
        "size": {
            "parameters": {"100k": {"optimizer.learning_rate": 1e-2}, "400k": {}, "2M": None},
            "width_per_layer": 16,
            "head_dim": 16,
        },
        "model.mixer": ["hope", "attention"],
    }
    for run in room.json(room.write(axes))["runs"]:
        target = {"100k": 1e5, "400k": 4e5, "2M": 2e6}[run["axes"]["size"]]
        assert abs(run["parameters"] / target - 1) < 0.25
    for target in (1e8, 1e9, 7e10):
        keys = Ladder(64, 128).rung("size", int(target), 32000)
        layers, width, heads = (keys[f"model.{k}"] for k in ("layers", "d_model", "heads"))
        assert width == 128 * heads and abs(width - 64 * layers) <= 64
        assert abs((12 * layers * width**2 + 2 * 32000 * width) / target - 1) < 0.25


def test_lengths_that_share_a_stable_phase_are_counted_once(room: Room) -> None:
    axes = {"run.seed": [1, 2], "train.steps": [400, 100, 200]}
    alone = room.json(room.write(axes))
    assert all(run["begins_from"] is None for run in alone["runs"]), "cosine shares nothing"
    shared = room.json(room.write(axes, set=WSD))
    begins = {run["name"]: (run["begins_from"], run["begins_at_step"]) for run in shared["runs"]}
    assert begins["seed1-steps100"] == (None, 0)
    assert begins["seed1-steps200"] == ("seed1-steps100", 75)
    assert begins["seed1-steps400"] == ("seed1-steps200", 150)
    assert begins["seed2-steps400"] == ("seed2-steps200", 150)
    steps = 100 + (200 - 75) + (400 - 150)
    assert shared["flops"] == pytest.approx(alone["flops"] * steps / 700)
    assert shared["flops_alone"] == pytest.approx(alone["flops"])


def test_the_table_shows_sizes_lengths_and_compute(room: Room) -> None:
    axes = {"model.mixer": ["hope", "attention"], "tokens": ["64k", "128k"]}
    sweep = room.write(axes, set=WSD)
    printed = room.list(sweep)
    runs = {run["name"]: run for run in room.json(sweep)["runs"]}
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("hope-128k "))
    longer = runs["hope-128k"]
    assert row[3:6] == ["128k", "1,000", "376"], "its first step is the one after 375"
    mantissa, exponent = row[6].split("e")
    assert float(mantissa) * 10 ** int(exponent) == pytest.approx(longer["flops"], rel=0.01)
    assert "less than if no run began from another" in printed
    assert "Hours are known once a run has finished" in printed
    assert not (room.folder / "runs").exists(), "a dry run writes nothing"


def test_a_cluster_prices_it_in_gpu_hours(room: Room) -> None:
    sweep = room.write({"run.seed": [1, 2]})
    cluster = room.folder / "cluster.yaml"
    machines = {"name": "mine", "nodes": 2, "gpus_per_node": 4, "inter_node_gbit": 400}
    machines["gpu_memory_gib"] = 80
    cluster.write_text(yaml.safe_dump(machines))
    said = room.list(sweep, "--cluster", str(cluster), code=2)
    assert "gpu_tflops" in said and said.count("\n") == 1
    cluster.write_text(yaml.safe_dump(machines | {"gpu_tflops": 1e-6}))
    plain = room.json(sweep, "--cluster", str(cluster), "--utilisation", "0.5")
    hours = plain["flops"] / (1e-6 * 1e12 * 0.5) / 3600
    assert plain["price"]["gpu_hours"] == pytest.approx(hours)
    assert plain["price"]["hours"] == pytest.approx(hours / 8)
    assert sum(run["gpu_hours"] for run in plain["runs"]) == pytest.approx(hours)
    printed = room.list(sweep, "--cluster", str(cluster), "--utilisation", "0.5")
    assert "50% of 1e-06 TFLOP/s" in printed and "8 GPUs of mine" in printed
    assert "--utilisation 40" in room.list(
        sweep, "--cluster", str(cluster), "--utilisation", "40", code=2
    )


@pytest.mark.parametrize(
    ("axes", "more", "says"),
    [
        ({}, {}, "axes is empty"),
        ({"run.seed": []}, {}, "axes.run.seed has no values"),
        ({"size": {}}, {}, "axes.size has no values"),
        ({"run.seeds": [1]}, {}, "unknown key 'run.seeds'; did you mean 'run.seed'?"),
        ({"size": {"s": {"model.width": 3}}}, {}, "axes.size.s: unknown key 'model.width'"),
        ({"size": {"s": 3}}, {}, "axes.size.s is 3; it must be keys"),
        ({"run.seed": 3}, {}, "axes.run.seed is 3; it must be a list"),
        ({"run.seed": [1, 1]}, {}, "two values are called seed1"),
        ({"optimizer.learning_rate": [0.001, 1e-3]}, {}, "are called learning_rate0.001"),
        ({"a": {"b c": {"run.seed": 1}, "b-c": {"run.seed": 2}}}, {}, "two values are called b.c"),
        ({"model.mixer": ["hop"]}, {}, "run hop: model.mixer: 'hop' is not one of hope"),
        ({"train.steps": ["many"]}, {}, "run many: train.steps: 'many' is not an integer"),
        ({"run.dir": ["a"]}, {}, "run.dir is what a sweep sets itself"),
        ({"tokens": {"per_param": [5]}}, {}, "unknown key 'per_param'; did you mean"),
        ({"tokens": {"per_parameter": [-5]}}, {}, "is -5; it must be a number above 0"),
        ({"tokens": ["5Q"]}, {}, "'5Q' is not a count"),
        ({"tokens": [100]}, {}, "run 100: 100 tokens are less than one step of 128"),
        ({"tokens": [1024], "train.steps": [5]}, {}, "axes tokens and train.steps both set"),
        ({"a": {"x": {"run.seed": 1}}, "run.seed": [2]}, {}, "a and run.seed both set run.seed"),
        ({"model.heads": [3]}, {}, "model.d_model 32 is not divisible by model.heads 3"),
        ({"run.seed": [1]}, {"worker": 2}, "unknown key 'worker'; did you mean 'workers'?"),
        ({"run.seed": [1]}, {"workers": 0}, "workers is 0"),
        ({"run.seed": [1]}, {"set": {"train.step": 1}}, "set: unknown key 'train.step'"),
        ({"run.seed": [1]}, {"set": {"levels": [4, 1]}}, "list the fastest level first"),
        ({"run.seed": [1], "n": {"x": {"train.steps": 5}, "y": {"train": {"steps": 5}}}}, {},
         "seed1-x and seed1-y are the same run of 5 steps"),
        ({"size": {"parameters": ["1k"], "width_per_layer": 64, "head_dim": 64}}, {},
         "run 1k: size 1k: with width_per_layer 64"),
        ({"size": {"parameters": ["1M"], "width_per_layer": 64}}, {}, "axes.size.head_dim is null"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_starts(
    room: Room, axes: Any, more: dict[str, Any], says: str
) -> None:
    assert says in room.refused(axes, **more)
    assert not (room.folder / "runs").exists()


def test_missing_data_name_the_command_that_builds_them(room: Room) -> None:
    build = "nlscale data build --source mine --out data/nowhere"
    sweep = room.write({"run.seed": [1]}, build_data=build)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(sweep)])
    assert ended.value.code == 2
    said = room._capsys.readouterr().err
    assert f"no data at data/nowhere; build it with: {build}" in said and said.count("\n") == 1
    assert not (room.folder / "runs").exists()


def test_listing_imports_no_torch(room: Room) -> None:
    sweep = room.write({"run.seed": [1, 2]})
    code = (
        "import sys; from nlscale.cli.command import _parse\n"
        f"args = _parse(['sweep', {str(sweep)!r}, '--dry-run']); args.func(args)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "runs", "chains"),
    [
        ("quickstart", 18, 6),
        ("hope-ladder", 25, 5),
        ("transformer-ladder", 25, 5),
        ("periods", 36, 12),
        ("needles", 6, 6),  # of a task, and of bytes
        ("optimizer-betas", 16, 16),  # those of its search are beside them
        ("frontier", 76, 76),
        ("frontier-muon", 36, 36),
        ("frontier-four-nodes", 24, 24),
        ("in-context", 8, 8),
        ("mixers", 72, 72),
        ("mixers-ingredients", 102, 102),
        ("mixers-tasks", 60, 60),
        ("mixers-state", 24, 24),
        ("word-problem", 32, 32),
    ],
)
def test_the_sweeps_of_the_repository_are_listed_without_data(
    room: Room, name: str, runs: int, chains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cluster = "recipes/clusters/one-node-8-gpus.yaml"
    plain = room.json(f"recipes/sweeps/{name}.yaml", "--cluster", cluster)
    assert len(plain["runs"]) == runs
    assert sum(run["begins_from"] is None for run in plain["runs"]) == chains
    assert plain["price"]["gpu_hours"] > 0


def test_long_runs_begin_first_and_equal_ones_in_the_order_of_the_file(room: Room) -> None:
    """A stopped sweep has done what was asked first; a long run is not left alone at the end."""
    widths = {"tiny": 24, "small": 64, "wide": 72}
    sizes = {name: {"model.d_model": width} for name, width in widths.items()}
    sweep = read_sweep(room.write({"size": sizes, "run.seed": [1, 2]}))
    runs = expand(sweep)
    share_stable_phases(sweep, runs, {})
    order = [tuple(run.axes.values()) for run in in_order(runs)]
    assert order == [(size, f"seed{i}") for size in ("small", "wide", "tiny") for i in (1, 2)]


def test_folders_of_runs_are_called_as_ever(tmp_path: Path) -> None:
    """Another name would be another run: one that has finished would be trained again."""
    path = tmp_path / "s.yaml"
    path.write_text(
        "recipe: quickstart\ndir: x\naxes:\n"
        "  lr: {1e-3: {optimizer.learning_rate: 1e-3}, on: {optimizer.learning_rate: 1}}\n"
        "  model.memory: [{anchored: true, eta_bias: 1e-3}]\n"
        "  optimizer.clip: [1e-3, 2, .5]\n"
        "  levels.stagger: [yes, false]\n"
        "  wandb.name: [nan, a b]\n"
        "  tokens: [1e6, 2M, 1_000]\n"
    )
    names = {axis: [v.name for v in values] for axis, values in read_sweep(path).axes.items()}
    assert names == {
        "lr": ["0.001", "True"],
        "model.memory": ["memory.anchored.True.eta_bias.0.001"],
        "optimizer.clip": ["clip0.001", "clip2", "clip0.5"],
        "levels.stagger": ["staggerTrue", "staggerFalse"],
        "wandb.name": ["nan", "a.b"],
        "tokens": ["1000000.0", "2M", "1000"],
    }


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ("{size: {parameters: [1M], width_per_layer: 8, head_dim: 0.3}}", "head_dim is 0.3"),
        ("{size: {parameters: [1M], width_per_layer: 8, head_dim: 16.6}}", "head_dim is 16.6"),
        ("{size: {parameters: [1M], width_per_layer: 1e300, head_dim: 8}}", "width_per_layer"),
        ("{size: {parameters: [1M], width_per_layer: .inf, head_dim: 8}}", "width_per_layer"),
        ("{tokens: {per_parameter: [1e300]}}", "at most 1,000,000"),
    ],
)
def test_numbers_of_a_grid_have_ranges(tmp_path: Path, axes: str, says: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"recipe: quickstart\ndir: x\naxes: {axes}\n")
    with pytest.raises(UserError, match=says):
        read_sweep(path)


def test_a_budget_of_runs_in_stages_is_in_their_own_tokens(room: Room) -> None:
    keys = {
        "model.mixer": "attention",
        "train.micro_batch": 4,
        "train.global_batch": [{"from": "0%", "size": 4}, {"from": "50%", "size": 8}],
        "data.stages": [{"from": "75%", "sequence_length": 64}],
    }
    runs = room.json(room.write({"tokens": ["8k", "32k"]}, set=keys))["runs"]
    for run, budget in zip(runs, (8_000, 32_000), strict=True):
        steps = run["steps"]
        half, quarter = round(steps / 2 + 1e-9), round(3 * steps / 4 + 1e-9)
        parts = {16: half * 4 * 16 + (quarter - half) * 8 * 16, 64: (steps - quarter) * 8 * 64}
        assert run["tokens"] == sum(parts.values())
        assert abs(run["tokens"] - budget) <= 8 * 64
        flops = 0.0
        for length, tokens in parts.items():
            keys_of = [f"data.sequence_length={length}", "data.stages=[]"]
            recipe_of = room.folder / "recipe.yaml"
            config = recipe.load(recipe_of, ["model.mixer=attention", *keys_of]).config
            flops += tokens * flops_per_token(config, 64)
        assert run["flops"] == pytest.approx(flops)

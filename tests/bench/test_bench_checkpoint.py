"""`nlscale bench checkpoint`: its numbers are those of the files that it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import world
from checkpoint.saved_runs import config

from nlscale import cli
from nlscale.bench.checkpoint import bench_checkpoint
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe

KEYS = {
    *("stall_seconds", "write_seconds", "bytes_per_second", "bytes", "files", "ratio"),
    *("theoretical_bytes", "verify_seconds", "load_seconds", "largest_file_ratio"),
    *("read_ratio", "median_step_seconds", "parameters"),
    *("pending_parameters", "saves", "ranks", "device", "dtype", "folder"),
}


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In an empty folder that is the current one, with its `runs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    recipe.write(config("run.dir=runs/one", "train.steps=4"), tmp_path / "some.yaml")
    return tmp_path / "some.yaml"


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "checkpoint", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def stored_bytes(store: Store) -> int:
    """Of the tensors of the last checkpoint."""
    return sum(info.bytes for info in store.checkpoints()[-1].tensors().values())


def test_it_prints_what_it_measured_and_leaves_nothing(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = bench(capsys, recipe_file, "--steps", 1, "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == KEYS and found["folder"] is None
    assert 0 < found["parameters"] > found["pending_parameters"] > 0
    assert 1 < found["ratio"] == found["bytes"] / found["theoretical_bytes"]
    times = [value for key, value in found.items() if key.endswith("_seconds")]
    assert len(times) == 5 and all(0 < value < 60 for value in times)
    assert os.listdir("runs") == []
    code, out, _ = bench(capsys, recipe_file, "--steps", 1)
    assert code == 0 and "training waits" in out and "of the state" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_bytes_are_those_of_the_state(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = bench(capsys, recipe_file, "--steps", 1, "--json", "--out", "kept")
    found = json.loads(out)
    assert code == 0 and found["folder"] == "kept"
    assert found["theoretical_bytes"] == stored_bytes(Store(Path("kept")))


RULES = {
    "canonical": ["optimizer.rule=muon"],
    "exact": ["optimizer.rule=m3", "levels=[1,{period: 4, optimizer: {rule: muon}}]"],
}


def measure(pending: str, out: Path) -> dict[str, Any]:
    """On a rank of a world, each of which counts as a node."""
    keys = [f"checkpoint.pending={pending}", "parallel.ranks_per_node=1", *RULES[pending]]
    own = config(*keys)
    return bench_checkpoint(own, 1, out)


@pytest.mark.parametrize("pending", ["canonical", "exact"])
def test_windows_kept_by_each_node_are_counted(tmp_path: Path, pending: str) -> None:
    found = world.run(2, measure, pending, tmp_path / "out")
    assert found[0]["ranks"] == 2 and found[0]["pending_parameters"] > 0
    assert found[0]["theoretical_bytes"] == stored_bytes(Store(tmp_path / "out"))
    assert found[0]["stall_seconds"] == found[1]["stall_seconds"]


def test_what_it_cannot_do_is_refused(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        (["model.vocabulary=null"], "model.vocabulary=256"),
        (["--out", "runs"], "--out runs exists"),
        (["--steps", "0"], "--steps 0"),
        (["parallel.tensor=2"], "use a multiple of 2 ranks"),
    ):
        code, out, err = bench(capsys, recipe_file, *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1

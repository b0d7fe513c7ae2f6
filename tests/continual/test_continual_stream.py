"""Streams: what runs a file stands for, and that they are learned, killed, and gone on with."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.streams import learn, write_stream
from data.mixtures import folder

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Store
from nlscale.cli import main
from nlscale.continual.matrix import Matrix
from nlscale.continual.stream import read_stream
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import expand
from nlscale.telemetry.figures import read_records

EVIDENCE = Path(__file__).parents[2] / "tools" / "evidence.py"
ALL = {
    "ewc": {"strength": 5, "sequences": 6},
    "lwf": {"strength": 0.5},
    "replay": {"share": 0.5, "size": 8, "level": "level1"},
    "freeze": {"levels": ["level2"]},
    "context": {
        "levels": {
            "level1": {"chunk": 8, "learning_rate": 0.5, "reset": "never"},
            "level0": {"chunk": 4, "learning_rate": 0.1},
        },
        "sequences": 4,
    },
}
KEPT = {"set": {"checkpoint": {"every": "1 step", "keep": 20}}, "optimizer": "reset", "every": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("web", "books"):
        folder(root, name, documents=8)
    return root


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a stream that nothing happened to, learned naively, and by all methods."""
    path = write_stream(
        tmp_path_factory.mktemp("stream"), data, methods={"naive": None, "all": ALL}, **KEPT
    )
    with pytest.raises(SystemExit) as ended:
        main(["continual", str(path)])
    assert not ended.value.code
    return path


def test_a_stream_leaves_its_matrix_and_is_not_learned_twice(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = undisturbed.parent / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    found = learn(undisturbed, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    assert len(before) == 2 and found["ends"] == [5, 9] and found["failed"] == {}
    for name, method in found["methods"].items():
        records = [
            r for r in read_records(runs / f"{name}-seed1234") if r.get("name") == "task-scores"
        ]
        assert [r["step"] for r in records] == [0, 3, 5, 6, 9]
        rows = [[r["web/bits_per_byte"], r["books/bits_per_byte"]] for r in records]
        assert [method["before"], *method["matrix"]] == [rows[0], rows[2], rows[4]]
        plain = Matrix(rows[0], [rows[2], rows[4]], higher=False).figures()
        assert {k: v["mean"] for k, v in method["figures"].items()} == plain
        assert rows[2][0] < rows[0][0] and rows[4][1] < rows[0][1]  # each task is learned
    naive, ours = (found["methods"][name] for name in ("naive", "all"))
    # before any step too, levels learn from what they are scored on
    assert all(0 < abs(a - b) < 0.1 for a, b in zip(naive["before"], ours["before"], strict=True))
    gap = ours["figures"]["forgetting"]["mean"] - naive["figures"]["forgetting"]["mean"]
    assert ours["against"]["forgetting"]["mean"] == pytest.approx(gap)
    assert json.loads((runs / "results.json").read_text())["methods"] == found["methods"]
    for figure in ("matrix.png", "curves.png"):
        assert (runs / figure).read_bytes().startswith(b"\x89PNG")


def test_the_others_are_compared_with_a_method_that_is_named(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = learn(undisturbed, capsys), learn(undisturbed, capsys, "--baseline", "all")
    assert (first["baseline"], other["baseline"]) == ("naive", "all")
    assert other["methods"]["all"]["against"] is None
    for figure, gap in first["methods"]["all"]["against"].items():
        assert other["methods"]["naive"]["against"][figure]["mean"] == -gap["mean"]
    with pytest.raises(SystemExit) as ended:
        main(["continual", str(undisturbed), "--baseline", "al"])
    assert ended.value.code == 2
    assert re.search(r"no method of \S+ is called 'al'; [^\n]*all", capsys.readouterr().err)


def test_packed_runs_are_finished_where_they_are_unpacked(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learn(undisturbed, capsys)
    packed, again = tmp_path / "runs.tar.xz", tmp_path / "again.tar.xz"
    for out in (packed, again):
        subprocess.run(
            [sys.executable, EVIDENCE, "runs", "--out", out], cwd=undisturbed.parent, check=True
        )
    assert packed.read_bytes() == again.read_bytes()
    runs, away = undisturbed.parent / "runs", undisturbed.parent / "away"
    runs.rename(away)
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(undisturbed.parent, filter="data")
        assert not list(runs.rglob("checkpoints"))
        assert learn(undisturbed, capsys) == found
        assert (runs / "curves.png").exists()
        assert not list(runs.rglob("train.log"))  # nothing was trained
        (runs / "naive-seed1234" / "config.yaml").unlink()
        torn = subprocess.run(
            [sys.executable, EVIDENCE, "runs", "--out", tmp_path / "torn"],
            cwd=undisturbed.parent,
            capture_output=True,
            text=True,
        )
        assert torn.returncode == 2 and not (tmp_path / "torn").exists()
        assert re.fullmatch(r"error: runs/naive-seed1234/config.yaml: [^\n]*\n", torn.stderr)
    finally:
        shutil.rmtree(runs, ignore_errors=True)
        away.rename(runs)


def test_a_frozen_level_keeps_its_weights(undisturbed: Path) -> None:
    checkpoints = Store(undisturbed.parent / "runs/all-seed1234/checkpoints").checkpoints()
    at = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    for level, same in enumerate([False, False, True]):
        name = f"weights/blocks.0.cms.mlps.{level}.up.weight"
        shape = at[5].tensors()[name].shape
        found = [torch.empty(shape), torch.empty(shape)]
        for checkpoint, tensor in zip((at[5], at[9]), found, strict=True):
            checkpoint.read([Piece(name, shape, (0, 0), tensor)])
        assert torch.equal(*found) == same


def test_optimizers_begin_anew_at_a_boundary(undisturbed: Path) -> None:
    checkpoints = Store(undisturbed.parent / "runs/naive-seed1234/checkpoints").checkpoints()
    at = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    moments = {
        step: {name for name in at[step].tensors() if name.startswith("exp_avg/")}
        for step in (4, 5, 6)
    }
    assert moments[4] and not moments[5]
    # what has been updated since has moments again: the first level whole, of others a part
    assert "exp_avg/embedding.weight" in moments[6] and moments[6] < moments[4]
    for group in at[9].state["levels"]:
        assert 0 < group["before_state"] < group["updates"]


def test_a_stream_that_is_killed_ends_in_the_same_matrix(
    data: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write_stream(tmp_path, data, methods={"all": ALL}, **KEPT), "runs/all-seed1234"
    shutil.copytree(undisturbed.parent / run, tmp_path / run)
    # as if the process had been killed when it had saved last in the midst of the second task
    (tmp_path / run / "summary.json").unlink()
    for checkpoint in Store(tmp_path / run / "checkpoints").checkpoints():
        if checkpoint.step > 6:
            shutil.rmtree(checkpoint.path)
    found = learn(path, capsys)
    theirs = json.loads((undisturbed.parent / "runs/results.json").read_text())
    assert found["methods"]["all"]["runs"] == theirs["methods"]["all"]["runs"]
    stores = [
        Store(each / "runs/all-seed1234/checkpoints") for each in (tmp_path, undisturbed.parent)
    ]
    last = [store.checkpoints()[-1] for store in stores]
    assert compare(*last)["bitwise"]
    assert {"ewc_precision", "ewc_centre", "lwf_weights", "context_change"} == set(
        last[0].state["kept"]
    )


def runs_of(path: Path) -> dict[str, Any]:
    return {run.name: run for run in expand(read_stream(path).sweep)}


def test_methods_change_what_they_say_and_nothing_else(tmp_path: Path) -> None:
    methods = {
        "naive": None,
        "joint": None,
        "replay": {"replay": {"share": 0.1}},
        "ewc": {"ewc": {}},
        "slow": {"set": {"levels": [1, 5]}, "replay": None},
    }
    path = write_stream(tmp_path, "data", methods=methods, seeds=[1, 2], every=4)
    runs = runs_of(path)
    assert list(runs) == [f"{name}-seed{seed}" for name in methods for seed in (1, 2)]
    for run in runs.values():
        config = run.config
        assert (config.train.steps, config.checkpoint.steps) == (9, [5])
        assert config.run.imports == ["nlscale.continual.methods"]
        assert (config.hooks[0].name, config.hooks[0].steps) == ("task-scores", [4, 5, 8, 9])
    naive, joint = runs["naive-seed1"].config, runs["joint-seed1"].config
    assert [s.dir for s in naive.data.mixture] == ["data/web"]
    (later,) = naive.data.stages
    assert (later.from_, [s.dir for s in later.mixture]) == ("5 steps", ["data/books"])
    assert [(s.dir, s.weight) for s in joint.data.mixture] == [("data/web", 5), ("data/books", 4)]
    assert joint.data.stages == []
    hooks = {name: runs[f"{name}-seed2"].config.hooks[1:] for name in methods}
    assert hooks["naive"] == hooks["joint"] == []
    ((replay,), (ewc,), (slow,)) = (hooks[name] for name in ("replay", "ewc", "slow"))
    assert (replay.name, replay.level, replay.options["share"]) == ("replay", "level2", "0.1")
    assert (ewc.name, ewc.steps, ewc.level) == ("ewc", [5], None)
    assert (slow.level, len(runs["slow-seed1"].config.levels.spectrum)) == ("level1", 2)
    seeds = {run.config.run.seed for run in runs.values()}
    assert seeds == {1, 2}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tasks": {"web": {"data": "x", "steps": 3}}}, "a stream has two or more"),
        ({"methods": {"ewd": None}}, "no method is called 'ewd'; did you mean 'ewc'?"),
        ({"methods": {"ewc": {"ewc": {"strenght": 1}}}}, "did you mean 'strength'?"),
        ({"methods": {"ewc": None}, "boundaries": "unknown"}, "{ewc: {level: level2}}"),
        ({"methods": {"freeze": {"freeze": {"levels": ["x"]}}}}, "no level is called 'x'"),
        ({"methods": {"a": {"set": {"train.steps": 3}, "naive": None}}}, "a stream sets itself"),
        ({"set": {"data.dir": "x"}}, "data.dir is what a stream sets itself"),
        ({"metric": "bits"}, "metric: 'bits' is not one of bits_per_byte, loss"),
        ({"optimizer": "reset", "boundaries": "unknown"}, "optimizer: reset is at boundaries"),
        ({"seeds": [1, 1]}, "seeds: one is there twice"),
    ],
)
def test_files_that_say_nothing_sensible_are_refused(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    path = write_stream(tmp_path, "data", **more)
    with pytest.raises(UserError) as raised:
        read_stream(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_level_can_say_when_to_consolidate_where_nobody_knows(tmp_path: Path) -> None:
    methods = {"ewc": {"ewc": {"level": "level2"}}, "lwf": {"lwf": {"level": "level1"}}}
    path = write_stream(tmp_path, "data", methods=methods, boundaries="unknown")
    found = itertools.chain(*(run.config.hooks[1:] for run in runs_of(path).values()))
    assert [(hook.name, hook.level, hook.steps) for hook in found] == [
        ("ewc", "level2", []),
        ("lwf", "level1", []),
    ]

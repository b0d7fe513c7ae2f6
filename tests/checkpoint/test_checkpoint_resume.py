"""A run that resumes is the run that never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train
from levels.level_runs import largest_difference

from nlscale.checkpoint.diff import compare

STEPS = 7
MIDDLE = 5  # in the middle of windows of both slow levels
BASE = ["levels=[1,2,3]", f"train.steps={STEPS}", "data.sequence_length=16", "model.layers=2"]
BATCH = "train.global_batch=4"  # of one sequence for each of four data-parallel ranks
TRANSFORMER = [
    "model.mixer=attention",
    "model.attention={kv_heads: 2, head_dim: 16, qk_norm: true}",
    "model.tie_embeddings=true",
    "train.z_loss=0.01",
]
RULES = [
    "levels=[{period: 1, optimizer: {rule: muon}}, "
    "{period: 2, optimizer: {rule: m3, m3: {every: 2}}}, {period: 3, optimizer: {rule: delta}}]"
]
LAYOUTS = {
    "1": (1, 1, []),
    "2": (2, 2, []),
    "4": (4, 4, []),
    "4-two-nodes": (4, 2, []),
    "8-four-nodes": (8, 2, []),
    "4-two-nodes-all": (4, 2, ["parallel.shard_optimizer=all"]),
    "8-four-nodes-all": (8, 2, ["parallel.shard_optimizer=all"]),
    "4-two-nodes-matrices": (4, 2, ["parallel.shard_optimizer=matrices"]),
    "tp2": (2, 2, ["parallel.tensor=2"]),
    "tp2-pp2": (4, 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2-sp-pp2x2": (
        4,
        4,
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.pipeline=2",
            "parallel.virtual_stages=2",
        ],
    ),
}
FOUR_STAGES = ["model.layers=4"]
"""Of a run that is on two virtual stages on each of two pipeline ranks, before or after."""


def run(layout: str, overrides: list[str], *args: object, **kwargs: object) -> list[dict]:
    ranks, per_node, spread = LAYOUTS[layout]
    return world.run(
        ranks, train, [*BASE, BATCH, *spread, *overrides], *args, *kwargs.values(),
        ranks_per_node=per_node,
    )  # fmt: skip


Whole = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(layout, step, *keys)`: a run that never stopped, saved after that step and its last.

    Its folder and what rank 0 returned; the same run is trained once.
    """
    done: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}

    def trained(layout: str, step: int, *keys: str) -> tuple[Path, dict[str, Any]]:
        asked = (layout, str(step), *keys)
        if asked not in done:
            folder = tmp_path_factory.mktemp("whole") / "checkpoints"
            done[asked] = folder, run(layout, list(keys), folder, (step,), False)[0]
        return done[asked]

    return trained


def saved_only_at(folder: Path, step: int, copy: Path) -> Path:
    """What a run that was killed after that checkpoint leaves behind."""
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        if path.name not in (checkpoint(folder, step).path.name,):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


@pytest.mark.parametrize(
    ("layout", "step", "dtype", "more"),
    [
        ("1", 1, "bf16", []),
        ("1", MIDDLE, "fp32", []),
        ("4-two-nodes", 4, "fp32", []),
        ("4-two-nodes", MIDDLE, "bf16", []),
        ("4-two-nodes-all", 3, "fp32", []),
        ("4-two-nodes-all", MIDDLE, "bf16", RULES),
        ("4-two-nodes-matrices", MIDDLE, "bf16", RULES),
        ("tp2-pp2", MIDDLE, "fp32", RULES),
        ("tp2-sp-pp2x2", MIDDLE, "fp32", FOUR_STAGES),
    ],
)
def test_resuming_on_the_same_layout_is_bitwise(
    tmp_path: Path, whole: Whole, layout: str, step: int, dtype: str, more: list[str]
) -> None:
    keys = [f"train.dtype={dtype}", *more]
    folder, never_stopped = whole(layout, step, *keys)
    rest = saved_only_at(folder, step, tmp_path / "rest")
    resumed = run(layout, keys, rest, (), True)[0]
    assert list(resumed["losses"]) == list(range(step + 1, STEPS + 1))
    assert resumed["losses"] == {s: never_stopped["losses"][s] for s in resumed["losses"]}
    result = compare(checkpoint(rest, STEPS), checkpoint(folder, STEPS))
    assert result["bitwise"], result
    assert largest_difference(resumed["parameters"], never_stopped["parameters"]) == 0


@pytest.mark.parametrize("layout", ["1", "4-two-nodes"])
def test_a_run_whose_first_steps_were_dropped_resumes_too(tmp_path: Path, layout: str) -> None:
    # Nothing is updated until step 4; the windows that close before hold no tokens.
    keys = ["levels.stagger=false"]
    dropped = (1, 2, 3)
    never_stopped = run(layout, keys, tmp_path / "whole", (3,), False, dropped)[0]
    rest = saved_only_at(tmp_path / "whole", 3, tmp_path / "rest")
    assert not any(name.startswith("exp_avg") for name in checkpoint(rest, 3).tensors())
    resumed = run(layout, keys, rest, (), True)[0]
    assert resumed["losses"] == {s: never_stopped["losses"][s] for s in resumed["losses"]}
    result = compare(checkpoint(rest, STEPS), checkpoint(tmp_path / "whole", STEPS))
    assert result["bitwise"], result


def test_another_rule_is_asked_for_and_begins_with_what_both_keep(
    tmp_path: Path, whole: Whole
) -> None:
    folder, never_stopped = whole("1", MIDDLE, "train.dtype=fp32")
    rest = saved_only_at(folder, MIDDLE, tmp_path / "rest")
    keys = ["train.dtype=fp32", "optimizer.rule=muon"]
    with pytest.raises(AssertionError, match=r"optimizer\.rule: 'adamw' -> 'muon'"):
        run("1", keys, rest, (), True)
    keys.append("resume.allow=[optimizer.rule]")
    resumed = run("1", keys, rest, (6,), True)[0]
    assert resumed["losses"][6] == never_stopped["losses"][6], "of the same weights"
    assert resumed["losses"][7] != never_stopped["losses"][7]
    names = checkpoint(rest, 6).tensors()
    assert {name.partition("/")[0] for name in names if "down" in name} >= {"weights", "momentum"}
    assert "exp_avg/embedding.weight" in names and "momentum/embedding.weight" not in names
    again = saved_only_at(rest, 6, tmp_path / "again")
    assert run("1", keys, again, (), True)[0]["losses"][7] == resumed["losses"][7]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tp2-pp2", "4"),
        ("4", "2"),
        ("2", "4"),
        ("4-two-nodes", "tp2-sp-pp2x2"),
        ("8-four-nodes-all", "4"),
        ("4", "8-four-nodes"),
        ("4-two-nodes", "8-four-nodes-all"),
        ("tp2-sp-pp2x2", "1"),
        ("tp2", "1"),
    ],
)
def test_resuming_on_another_layout_is_within_rounding(
    tmp_path: Path, whole: Whole, one: str, other: str
) -> None:
    keys = ["train.dtype=fp32"]
    if (one, other) == ("tp2", "1"):
        keys += TRANSFORMER
    if (one, other) in (("4-two-nodes", "tp2-sp-pp2x2"), ("8-four-nodes-all", "4")):
        keys += RULES
    if "8-four-nodes" in f"{one} {other}":
        keys.append("train.global_batch=8")
    if "pp2x2" in f"{one} {other}":
        keys += FOUR_STAGES
    folder, never_stopped = whole(one, MIDDLE, *keys)
    rest = saved_only_at(folder, MIDDLE, tmp_path / "rest")
    resumed = run(other, keys, rest, (), True)[0]
    for s, loss in resumed["losses"].items():
        assert loss == pytest.approx(never_stopped["losses"][s], rel=1e-6)
    assert largest_difference(resumed["parameters"], never_stopped["parameters"]) < 1e-6
    result = compare(checkpoint(rest, STEPS), checkpoint(folder, STEPS))
    assert not result["bitwise"], "two layouts that round alike prove nothing"
    assert result["classes"]["optimizer"]["max_relative_difference"] < 1e-5
    assert set(result["classes"]["progress"]["differs"]) <= {"bytes_sent", "bytes_saved"}
    assert result["classes"]["samples"]["bitwise"]


@pytest.mark.parametrize(
    ("one", "other", "more"),
    [
        ("tp2-pp2", "4", []),
        ("4-two-nodes-all", "tp2-sp-pp2x2", FOUR_STAGES),
        ("tp2-pp2", "4-two-nodes-matrices", RULES),
    ],
)
def test_another_layout_loads_the_very_same_state(
    tmp_path: Path, whole: Whole, one: str, other: str, more: list[str]
) -> None:
    # no step after resuming: what was loaded, windows half full, is written again by other ranks
    folder, _ = whole(one, MIDDLE, "train.dtype=fp32", *more)
    again = saved_only_at(folder, MIDDLE, tmp_path / "again")
    ranks, per_node, spread = LAYOUTS[other]
    keys = [*BASE, BATCH, *spread, *more]
    world.run(ranks, load_and_save, keys, again, ranks_per_node=per_node)
    before, after = checkpoint(folder, MIDDLE), checkpoint(again, MIDDLE)
    assert before.state["layout"] != after.state["layout"]
    assert any(name.startswith("window/") for name in before.tensors())
    result = compare(after, before)
    assert result["bitwise"], result


@pytest.mark.parametrize("layout", ["4-two-nodes", "4-two-nodes-all"])
def test_windows_kept_exactly_do_not_touch_the_run(tmp_path: Path, layout: str) -> None:
    keys = ["checkpoint.pending=exact"]
    never_saved = run(layout, keys, tmp_path / "never", (), False)[0]
    run(layout, keys, tmp_path / "whole", (MIDDLE,), False)
    rest = saved_only_at(tmp_path / "whole", MIDDLE, tmp_path / "rest")
    resumed = run(layout, keys, rest, (), True)[0]
    assert largest_difference(resumed["parameters"], never_saved["parameters"]) == 0
    rest = saved_only_at(tmp_path / "whole", MIDDLE, tmp_path / "other")
    with pytest.raises(AssertionError, match=r"checkpoint\.pending=exact resumes on the same"):
        run("4", keys, rest, (), True)

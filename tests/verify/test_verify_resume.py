"""`nlscale verify-resume`: the proof that a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, stage_of
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.verify.resume import Arrangement, _stages_in_place

COMMAND = [sys.executable, "-m", "nlscale", "verify-resume", "recipes/quickstart.yaml"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ranks=4", "ranks=4"),
        ("tensor=2,ranks=2", "ranks=2,tensor=2"),
        ("ranks=4,ranks_per_node=2", "ranks=4,ranks_per_node=2"),
    ],
)
def test_a_layout_is_read_and_shown(text: str, shown: str) -> None:
    layout = Arrangement.parse(text)
    assert str(layout) == shown
    assert "parallel.pipeline=1" in layout.overrides  # whatever the recipe says


@pytest.mark.parametrize("text", ["tensor=2", "ranks=two", "ranks=2,heads=3", ""])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write ranks=N"):
        Arrangement.parse(text)


def test_stages_stand_where_they_do_in_the_recipe() -> None:
    given = [
        "data.dir=x", "train.steps=100", "data.sequence_length=32",
        "data.stages=[{from: 5%, sequence_length: 64}, {from: 50 steps, sequence_length: 32}]",
        "train.global_batch=[{from: 0%, size: 4}, {from: 3%, size: 8}, {from: 90%, size: 16}]",
    ]  # fmt: skip
    config = recipe.load(None, given).config
    for steps in (4, 8, 60):
        short = [*given, *_stages_in_place(config, steps), f"train.steps={steps}"]
        stages = curriculum(recipe.load(None, short).config)
        for step in range(1, steps + 1):
            here, there = stage_of(stages, step), stage_of(curriculum(config), step)
            assert replace(here, steps=there.steps) == there
    plain = recipe.load(None, given[:2]).config
    assert _stages_in_place(plain, 8) == []


def test_periods_change_where_they_do_in_the_recipe() -> None:
    given = [
        "data.dir=x", "train.steps=100", "levels=[1,8]", "levels.period_warmup.steps=30%",
        "levels.period_warmup.cooldown=90%",
        "levels.period_warmup.critical_batch=[{from: 0, tokens: 1M tokens}, "
        "{from: 40%, tokens: 140k tokens}]",
    ]  # fmt: skip
    (_, level) = levels_of(recipe.load(None, given).config)
    for steps in (4, 35, 60):
        config = recipe.load(None, given).config
        short = [*given, *_stages_in_place(config, steps), f"train.steps={steps}"]
        (_, own) = levels_of(recipe.load(None, short).config)
        for step in range(1, steps + 1):
            assert own.period_at(step) == level.period_at(step)


def test_a_killed_run_resumes_bit_for_bit_and_elsewhere_within_rounding(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"{i}: the slow level waits for its window. " * 80)
    data = tmp_path / "shards"
    build([str(text)], "bytes", data, held_out=0.2)
    small = [
        f"data.dir={data}", "data.sequence_length=32", "levels=[1,2,5]", "model.layers=2",
        "model.d_model=64", "train.micro_batch=4", "train.validation_sequences=8",
    ]  # fmt: skip
    arguments = ["--at", "7", "--layout", "ranks=2,tensor=2", "--json"]
    done = subprocess.run([*COMMAND, *arguments, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bitwise"] is True and result["passed"] is True
    same, other = result["layouts"]
    assert same["layout"] == "ranks=2" and same["compared_at"] == result["steps"] == 15
    assert same["bitwise"] and same["max_relative_difference"] == 0
    assert other["layout"] == "ranks=2,tensor=2" and other["compared_at"] == 8
    assert 0 < other["max_relative_difference"] <= 1e-6
    assert other["classes"]["samples"]["bitwise"] and other["classes"]["progress"]["bitwise"]
    assert 0 < other["classes"]["windows"]["relative_difference"] <= 1e-6


def test_a_step_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--at", "500"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "use 1 to 400" in done.stderr

"""The stages of a run: what a step takes, and how samples and tokens are counted."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.curriculum import (
    TrainingStage,
    alike_until,
    at_stage,
    curriculum,
    largest,
    of_plain,
    samples_until,
    stage_of,
    steps_for,
    tokens_per_step,
    tokens_until,
    total_tokens,
)
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError

TEXT = """\
data:
  dir: none
  sequence_length: 1024
  stages:
    - {from: 80%, sequence_length: 4096}
train:
  steps: 2000
  global_batch: [{from: 0%, size: 32}, {from: 25%, size: 64}, {from: 1000 steps, size: 128}]
"""


def load(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", *overrides]).config


def batches(*stages: tuple[str, int]) -> str:
    inside = ", ".join(f"{{from: {start}, size: {size}}}" for start, size in stages)
    return f"train.global_batch=[{inside}]"


def lengths(*stages: tuple[str, int]) -> str:
    inside = ", ".join(f"{{from: {start}, sequence_length: {size}}}" for start, size in stages)
    return f"data.stages=[{inside}]"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_the_stages_of_a_recipe_by_hand(written: Path) -> None:
    found = curriculum(recipe.load(written).config)
    before = 500 * 32 + 500 * 64 + 600 * 128
    assert found == [
        TrainingStage(0, 500, 0, 0, 32, 1024, 0, 0),
        TrainingStage(500, 500, 16_000, 16_000 * 1024, 64, 1024, 0, 16_000),
        TrainingStage(1000, 600, 48_000, 48_000 * 1024, 128, 1024, 0, 48_000),
        TrainingStage(1600, 400, before, before * 1024, 128, 4096, 1, 0),
    ]
    assert [stage.tokens_per_step for stage in found] == [32768, 65536, 131072, 524288]
    assert total_tokens(recipe.load(written).config) == before * 1024 + 400 * 128 * 4096
    assert largest(recipe.load(written).config) == found[3]


def test_a_run_without_stages_is_one() -> None:
    config = load("train.steps=7", "train.global_batch=6", "data.sequence_length=5")
    assert curriculum(config) == [TrainingStage(0, 7, 0, 0, 6, 5)]
    assert config.train.global_batch == 6 and tokens_per_step(config) == 30
    assert at_stage(config, curriculum(config)[0]) == config


@pytest.mark.parametrize("seed", range(12))
def test_what_is_counted_is_what_steps_take_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    steps = draw.randint(8, 40)

    def places(fewest: int) -> list[int]:
        return sorted(draw.sample(range(1, steps), draw.randint(fewest, 4)))

    sizes = [(0, draw.randint(1, 5)), *((p, draw.randint(1, 5)) for p in places(0))]
    longs, length = [], 4
    for place in places(1):
        length = draw.choice([other for other in (3, 4, 7) if other != length])
        longs.append((place, length))
    config = load(
        f"train.steps={steps}",
        "data.sequence_length=4",
        batches(*((f"{place} steps", size) for place, size in sizes)),
        lengths(*((f"{place} steps", length) for place, length in longs)),
    )
    stages = curriculum(config)
    samples = tokens = 0
    seen: dict[int, list[int]] = defaultdict(list)
    for step in range(1, steps + 1):
        size = [size for place, size in sizes if place < step][-1]
        length = [length for place, length in [(0, 4), *longs] if place < step][-1]
        stage = stage_of(stages, step)
        assert (stage.global_batch, stage.sequence_length) == (size, length)
        assert samples_until(stages, step - 1) == samples
        assert tokens_until(stages, step - 1) == tokens
        numbers = [stage.number_in_cut(samples + i) for i in range(size)]
        seen[length] += numbers
        assert stage.cut == list(seen).index(length)
        samples, tokens = samples + size, tokens + size * length
    assert (samples_until(stages, steps), total_tokens(config)) == (samples, tokens)
    assert sum(stage.steps for stage in stages) == steps
    for numbers in seen.values():  # each once, in order, whatever comes in between
        assert numbers == list(range(len(numbers)))


def test_what_a_run_writes_is_the_same_run(written: Path, tmp_path: Path) -> None:
    config = recipe.load(written).config
    recipe.write(config, tmp_path / "config.yaml")
    assert "\n  - from: 80%\n    sequence_length: 4096\n" in (tmp_path / "config.yaml").read_text()
    assert recipe.load(tmp_path / "config.yaml").config == config
    assert of_plain(recipe.to_plain(config)) == curriculum(config)
    before = recipe.to_plain(load("train.steps=7"))
    del before["data"]["stages"]  # saved before there were any
    assert of_plain(before) == curriculum(load("train.steps=7"))
    before["data"]["stages"] = [{"from": "2 steps", "sequence_length": 1024}]  # accepted then
    assert of_plain(before) == curriculum(load("train.steps=7"))


def test_overrides_reach_a_list_and_replace_it(written: Path) -> None:
    def sizes(*overrides: str) -> list[int]:
        return [s.global_batch for s in curriculum(recipe.load(written, [*overrides]).config)]

    assert sizes("train.global_batch.1.size=48") == [32, 48, 128, 128]
    assert sizes("train.global_batch=64") == [64, 64]
    assert sizes("train.global_batch.2.from=75%") == [32, 64, 128, 128]
    assert sizes("train.global_batch.1.size=${train.micro_batch}") == [32, 4, 128, 128]


def test_explain_says_what_an_entry_is(written: Path) -> None:
    loaded = recipe.load(written)
    said = recipe.explain(loaded, "train.global_batch.1.from").splitlines()
    assert said[0] == "train.global_batch.1.from = 25%"
    assert said[1] == f"  from: {written} line 8"
    said = recipe.explain(recipe.load(None, ["data.dir=x"]), "data.stages.0.from").splitlines()
    assert said[0] == "data.stages.0.from is not set: data.stages = []"
    assert "share of train.steps" in said[2]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch=[]", "train.global_batch: no stage begins with the run"),
        ("train.global_batch.0.from=3%", "train.global_batch: no stage begins with the run"),
        ("train.global_batch.1.from=abc", "train.global_batch.1.from: 'abc' is not a place"),
        ("train.global_batch.1.from=101%", "train.global_batch.1.from: '101%' is after the end"),
        ("train.global_batch.1.from=2k%", "train.global_batch.1.from: '2k%' is not a place"),
        ("train.global_batch.1.from=1.5 steps", "train.global_batch.1.from: '1.5 steps' is no"),
        ("train.global_batch.2.from=25%", "train.global_batch.2.from: '25%' is after 500 of 2,000"),
        ("train.global_batch.2.from=100%", "train.global_batch.2.from: '100%' is not before the"),
        ("train.steps=900", "train.global_batch.2.from: '1000 steps' is not before the end of a"),
        ("train.global_batch.0.size=0", "train.global_batch.0.size is 0; it must be above 0"),
        ("train.global_batch=[{size: 3}]", "train.global_batch.0.from is not set"),
        ("train.global_batch=[1, 2]", "train.global_batch.0 is 1; it must be a section of keys"),
        ("train.global_batch=x", "train.global_batch: 'x' is not an integer"),
        ("train.global_batch=${model.mixer}", "train.global_batch is 'hope'; it must be a whole"),
        ("train.global_batch.1.sise=4", "did you mean 'train.global_batch.1.size'?"),
        ("data.stages.0.from=0%", "data.stages.0.from: it begins with the run"),
        ("data.stages.0.sequence_length=null", "data.stages.0 changes nothing"),
        ("data.stages.0.sequence_length=1024", "data.stages.0 changes nothing: sequences have 1"),
    ],
)
def test_what_is_no_curriculum_is_refused_with_its_key(
    written: Path, override: str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        recipe.load(written, [override])
    line = str(refused.value)
    assert said in line and "\n" not in line
    assert "line 8)" in line or "the command line)" in line or str(written) in line


def test_an_entry_of_a_number_is_told_of_the_list() -> None:
    with pytest.raises(UserError, match=r"no list there; first give train.global_batch=\[...\]"):
        load("train.global_batch=64", "train.global_batch.0.size=3")


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_of_tokens_is_met_by_the_nearest_length(seed: int) -> None:
    draw = random.Random(seed)
    sizes = batches(("0%", draw.randint(1, 9)), ("25%", draw.randint(1, 9)))
    config = load("train.steps=100", "data.sequence_length=2", sizes, lengths(("60%", 5)))

    def tokens(steps: int) -> int:
        return total_tokens(replace(config, train=replace(config.train, steps=steps)))

    wanted = draw.randint(500, 2000)
    found = steps_for(config, wanted)
    nearest = min(abs(tokens(steps) - wanted) for steps in range(10, 1500))
    assert abs(tokens(found) - wanted) == nearest


def test_a_longer_run_is_alike_until_a_share_begins() -> None:
    config = load("train.steps=100", batches(("0%", 1), ("30 steps", 2), ("40%", 4)))
    assert alike_until(config, 100) == 40
    short, long = (
        curriculum(replace(config, train=replace(config.train, steps=steps)))
        for steps in (100, 200)
    )
    same = [stage_of(short, n).global_batch == stage_of(long, n).global_batch for n in range(1, 42)]
    assert same == [True] * 40 + [False]
    assert alike_until(load("train.steps=100", batches(("0%", 1), ("30 steps", 2))), 100) == 100

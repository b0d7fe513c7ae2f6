"""The table of `nlscale config --optimizer` says what the optimizers of a run do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import world
from levels.level_runs import TINY, load

from nlscale.model.sizes import level_parameters

VOCABULARY = 32
OVERRIDES = [
    "model.layers=3",
    "model.mup_base_width=8",  # a fourth of the width: one head
    "levels=[{name: fast, period: 1}, {name: mid, period: 2, learning_rate: 0.5}, "
    "{name: slow, period: 4, optimizer: {rule: m3, m3: {every: 3}}}]",
    "optimizer.rule=muon",
    "optimizer.matrices.learning_rate=3",
    "optimizer.betas_by_period=true",
    "optimizer.learning_rate=0.01",
    "optimizer.beta2=0.9",
    "train.global_batch=4",
    "train.micro_batch=4",
]


def tables(overrides: list[str]) -> list[dict[str, Any]]:
    from nlscale.levels.assigned import assigned

    return [
        {"numbers": own.numbers, **{kind.name: kind for kind in own.kinds}}
        for own in assigned(load(overrides), VOCABULARY)
    ]


@pytest.fixture(scope="module")
def levels() -> list[dict[str, Any]]:
    (found,) = world.run(1, tables, OVERRIDES)
    return found


def test_each_parameter_has_the_rule_rate_and_decay_of_its_kind(
    levels: list[dict[str, Any]],
) -> None:
    fast, mid, slow = levels
    assert {name for name, kind in fast.items() if name != "numbers" and kind.rule == "muon"} == {
        f"blocks.*.{name}" for name in ("mixer.project.weight", "mixer.output.weight",
        "mixer.memory_key", "mixer.memory_value", "cms.mlps.0.up.weight", "cms.mlps.0.down.weight")
    }  # fmt: skip
    embedding, norm = fast["embedding.weight"], fast["norm.weight"]
    assert (embedding.rule, embedding.rate) == ("adamw", 1.0)
    assert embedding.decay == pytest.approx(0.1)
    assert (norm.rule, norm.rate, norm.decay, norm.tensors) == ("adamw", 1.0, 0.0, 1)
    # adamw-rms: the rate falls as the root of the width, 4 times the base; the decay rises
    project = fast["blocks.*.mixer.project.weight"]
    assert (project.rate, project.decay) == (3 / 2, pytest.approx(0.1 * 2))
    assert project.shapes == {(32, 32): 4, (4, 32): 2}
    memory = fast["blocks.*.mixer.memory_key"]
    assert (memory.rate, memory.shapes, memory.tensors) == (3.0, {(8, 8): 4}, 3)
    assert memory.decay == pytest.approx(0.1)
    up = mid["blocks.*.cms.mlps.1.up.weight"]
    ((hidden, inputs),) = up.shapes
    assert (inputs, up.shapes[hidden, inputs], up.rule) == (32, 2, "muon")
    assert up.rate == 0.5 * 3 / 2
    kept = 1 - up.rate * 0.01 * up.decay  # by one update, as by two at a period of one step
    assert kept == pytest.approx((1 - up.rate * 0.01 * 0.2) ** 2)
    assert slow["blocks.*.cms.mlps.2.down.weight"].rule == "m3"


def test_memories_are_those_at_the_levels_period(levels: list[dict[str, Any]]) -> None:
    fast, mid, slow = (level["numbers"] for level in levels)
    assert fast == {"muon": {"momentum": 0.95}, "adamw": {"beta1": 0.9, "beta2": 0.9}}
    assert mid["muon"] == {"momentum": pytest.approx(0.95**2)}
    assert mid["adamw"] == {"beta1": pytest.approx(0.81), "beta2": pytest.approx(0.81)}
    own = slow["m3"]
    assert own["momentum"] == pytest.approx(0.95**4) and own["slow_momentum"] == 0.9
    assert own["every"] == 3 and set(slow) == {"m3", "adamw"}


def test_nothing_is_left_out(levels: list[dict[str, Any]]) -> None:
    counts = [
        sum(kind.parameters for name, kind in level.items() if name != "numbers")
        for level in levels
    ]
    assert counts == level_parameters(load(OVERRIDES), VOCABULARY)


def test_the_command_prints_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("")
    argv = ["config", str(recipe), "--optimizer", *TINY, *OVERRIDES, "model.vocabulary=32"]
    (ended,) = world.command(1, argv, tmp_path / "out")
    assert ended.code == 0, ended.output
    lines = [line.split() for line in ended.output.splitlines()]
    project = next(words for words in lines if words[:1] == ["blocks.*.mixer.project.weight"])
    assert project[-3:] == ["muon", "1.5", "0.2"]
    assert "4 x [32, 32], 2 x [4, 32]" in " ".join(project)
    assert ["level", "slow:", "period", "4", "steps"] in lines
    assert any(words[0] == "m3:" and words[-1] == "matrices" for words in lines if words)


def test_a_level_that_holds_copies_has_nothing_under_a_rule() -> None:
    keys = ["model.cms=nested", "levels=[1,2]", "optimizer.rule=muon"]
    (found,) = world.run(1, tables, keys)
    assert "blocks.*.cms.mlps.0.up.weight" in found[0]
    assert found[1] == {"numbers": {}}

"""What another configuration may and may not change when it goes on from a checkpoint."""

from __future__ import annotations

import pytest

from nlscale.checkpoint.same_run import check_same_run, differences
from nlscale.config import recipe
from nlscale.errors import UserError

BASE = ["data.dir=a", "model.layers=2", "levels=[1,4]"]
DATA = {"fingerprint": "x", "train_tokens": 10}


def configuration(*overrides: str) -> recipe.Config:
    return recipe.load(None, [*BASE, *overrides]).config


def saved(*overrides: str, data: dict | None = None) -> dict:
    return {"config": recipe.to_plain(configuration(*overrides)), "data": data or DATA}


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "data.dir=moved",
        "parallel.tensor=2",
        "timeouts.step=60",
        "train.micro_batch=2",
        "train.recompute=[cms]",
        "checkpoint.every=5 steps",
        "wandb.enabled=true",
    ],
)
def test_where_and_how_fast_a_run_goes_may_change(override: str) -> None:
    check_same_run(configuration(override), DATA, saved(), "it")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate: 0.001 -> 0.5"),
        ("train.global_batch=64", "train.global_batch: 32 -> 64"),
        ("levels.spectrum.1.period=8", "levels.spectrum.1.period: '4' -> '8'"),
        ("train.dtype=fp32", "train.dtype: 'bf16' -> 'fp32'"),
        ("run.seed=1", "run.seed: 1234 -> 1"),
    ],
)
def test_what_makes_it_another_run_is_shown_and_refused(override: str, line: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError) as refusal:
        check_same_run(configuration(override), DATA, saved(), "runs/x/checkpoints/step-5")
    assert line in str(refusal.value)
    assert str(refusal.value).count("->") == 1
    assert f"'resume.allow=[{key}]'" in str(refusal.value)
    check_same_run(configuration(override, f"resume.allow=[{key}]"), DATA, saved(), "it")


def test_other_data_are_refused_unless_stated() -> None:
    other = {"fingerprint": "y", "train_tokens": 10}
    with pytest.raises(UserError, match=r"(?s)data: .*'resume.allow=\[data\]'"):
        check_same_run(configuration(), other, saved(), "it")
    check_same_run(configuration("resume.allow=[data]"), other, saved(), "it")


def test_allowing_what_is_no_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"resume\.allow: unknown key 'optimizer.lr'"):
        check_same_run(configuration("resume.allow=[optimizer.lr]"), DATA, saved(), "it")


def test_a_level_more_is_one_difference() -> None:
    found = differences(
        recipe.to_plain(configuration("levels=[1,4,16]")), recipe.to_plain(configuration())
    )
    assert list(found) == ["levels.spectrum"]

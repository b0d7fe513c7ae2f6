"""A run that begins from another's stable phase is the run that it would have been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import world
from scaling.sweeps import WSD, make_data, write_sweep
from train.test_train_run import records

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.same_run import check_same_run
from nlscale.checkpoint.store.store import Store
from nlscale.cli import main
from nlscale.cluster.life.signals import StopSignals
from nlscale.config import recipe
from nlscale.config.vocabulary import OptimizerConfig, Schedule
from nlscale.errors import UserError
from nlscale.optim.schedule import learning_rate, stable_steps
from nlscale.train.loop import train
from nlscale.train.prepare import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


def run(path: Path, overrides: list[str]) -> dict[str, Any]:
    """What `nlscale train` does; an error of the user's as its text."""
    config = recipe.load(path, overrides).config
    try:
        with StopSignals() as signals:
            return train(config, prepare(config), signals)
    except UserError as error:
        return {"error": str(error)}


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_branches_are_bit_for_bit_the_runs_from_the_beginning(
    data: Path, tmp_path: Path, mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths whose stable phases end within windows of the slow levels, of periods 2 and 4."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a world's: sums depend on it
    lengths = [9, 13, 22]
    keys = WSD | {"model.mixer": mixer, "train.validate_every": 5, "optimizer.warmup_updates": 3}
    sweep = write_sweep(tmp_path, data, {"train.steps": lengths}, set=keys)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(sweep)])
    assert ended.value.code == 0
    windows_open = False
    for steps in lengths:
        branch, whole = tmp_path / "runs" / f"steps{steps}", tmp_path / f"whole{steps}"
        overrides = [f"{key}={value}" for key, value in keys.items()]
        overrides += [f"train.steps={steps}", f"run.dir={whole}", "checkpoint.every=null"]
        overrides += ["checkpoint.steps=[1]"]
        (summary,) = world.run(1, run, tmp_path / "recipe.yaml", overrides)
        ends = [Store(folder / "checkpoints").checkpoints()[-1] for folder in (branch, whole)]
        assert [end.step for end in ends] == [steps, steps]
        result = compare(*ends)
        assert result["bitwise"], result
        ours = json.loads((branch / "summary.json").read_text())
        for key in ("final_val_loss", "final_train_loss", "initial_loss", "tokens", "levels"):
            assert ours[key] == summary[key], key
        losses = {r["step"]: r["loss"] for r in records(whole, "train")}
        config = recipe.load(branch / "config.yaml").config
        if config.resume.start is None:
            assert steps == lengths[0]
            continue
        start = Path(config.resume.start)
        state = json.loads((start / "state.json").read_text())
        windows_open |= any(level["tokens"] for level in state["levels"])
        mine = {r["step"]: r["loss"] for r in records(branch, "train")}
        assert list(mine) == list(range(state["step"] + 1, steps + 1)), "the rest is not repeated"
        assert mine == {step: losses[step] for step in mine}
    assert windows_open, "a branch must begin in the middle of a window, or this proves less"


def test_the_stable_phase_is_what_no_length_changes() -> None:
    config = OptimizerConfig(
        schedule=Schedule.wsd, warmup_steps=7, decay_fraction=0.23, learning_rate=3e-3
    )
    for steps in (12, 20, 57, 100):
        stable = stable_steps(config, steps)
        assert 0 < stable < steps
        for longer in (steps, steps + 1, 3 * steps):
            for step in range(1, stable + 1):
                assert learning_rate(config, step, steps) == learning_rate(config, step, longer)
        assert learning_rate(config, stable + 1, steps) < learning_rate(config, stable + 1, 999)
    assert stable_steps(config, 6) == 0, "shorter than its warm-up"
    config.schedule = Schedule.cosine
    assert stable_steps(config, 100) == 0


def configuration(*overrides: str) -> recipe.Config:
    return recipe.load(None, ["data.dir=a", "optimizer.schedule=wsd", *overrides]).config


def saved(step: int, *overrides: str) -> dict[str, Any]:
    return {"config": recipe.to_plain(configuration(*overrides)), "data": {}, "step": step}


def test_another_length_is_the_same_run_until_the_learning_rate_falls() -> None:
    longer, shorter = "train.steps=2000", "train.steps=1000"
    check_same_run(configuration(longer), {}, saved(800, shorter), "it")
    check_same_run(configuration(shorter), {}, saved(800, longer), "it")
    for step in (801, 1000):
        with pytest.raises(UserError, match=r"train\.steps: 1000 -> 2000"):
            check_same_run(configuration(longer), {}, saved(step, shorter), "it")
        with pytest.raises(UserError, match=r"train\.steps: 2000 -> 1000"):
            check_same_run(configuration(shorter), {}, saved(step, longer), "it")
    with pytest.raises(UserError, match=r"train\.steps: 1000 -> 50\b"):
        check_same_run(configuration("train.steps=50"), {}, saved(10, shorter), "it")
    cosine = "optimizer.schedule=cosine"
    with pytest.raises(UserError, match=r"train\.steps: 1000 -> 2000"):
        check_same_run(configuration(longer, cosine), {}, saved(1, shorter, cosine), "it")
    # a schedule that was changed on purpose says nothing about what the steps so far had
    allowed = ["optimizer.decay_fraction=0.1", "resume.allow=[optimizer.decay_fraction]"]
    with pytest.raises(UserError, match=r"train\.steps: 1000 -> 2000"):
        check_same_run(configuration(longer, *allowed), {}, saved(1, shorter), "it")


def test_what_cannot_be_begun_from_is_refused(data: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path, data, {"run.seed": [1]})
    path = tmp_path / "recipe.yaml"
    wsd = [f"{key}={value}" for key, value in WSD.items()]
    first = tmp_path / "first"
    world.run(1, run, path, [*wsd, f"run.dir={first}", "train.steps=8"])
    starts = {step: f"resume.start={first}/checkpoints/step-{step:08d}" for step in (4, 5, 8)}
    start = starts[4]
    second = f"run.dir={tmp_path}/second"
    longer = [*wsd, second, "train.steps=16"]
    (missing,) = world.run(1, run, path, [*longer, starts[5]])
    assert "there is no checkpoint" in missing["error"] and "step-00000005" in missing["error"]
    (other,) = world.run(1, run, path, [*longer, start, "optimizer.beta2=0.9"])
    assert "optimizer.beta2: 0.95 -> 0.9" in other["error"]
    (late,) = world.run(1, run, path, [*longer, starts[8]])
    assert "train.steps: 8 -> 16" in late["error"]
    (shard,) = (first / "checkpoints" / "step-00000004").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    (broken,) = world.run(1, run, path, [*longer, start])
    assert "is truncated" in broken["error"]
    shard.write_bytes(whole)
    (done,) = world.run(1, run, path, [*longer, start])
    assert done["steps"] == 16 and done["tokens"] == 16 * 8 * 16
    # with a checkpoint of its own a run goes on from that, wherever it began
    (tmp_path / "second" / "summary.json").unlink()
    shard.unlink()
    (again,) = world.run(1, run, path, [*longer, start])
    assert again["final_val_loss"] == done["final_val_loss"]

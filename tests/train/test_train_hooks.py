"""Hooks: called on the cadence of a level, remembered by checkpoints, and what the built-in do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import world
from train.test_train_run import SMALL, records, run, small_data

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.train.hooks.table import check
from nlscale.train.replay import Replay, reservoir, uniform

HOOKS = (
    "hooks=[{name: replay, level: level2, options: {size: 6, share: 0.5}}, "
    "{name: average, level: level1, options: {decay: 0.5}}, "
    "{name: evaluate, steps: [3, 5], options: {names: [loss]}}]"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


def asked(data: Path, folder: Path, *more: str) -> list[str]:
    steps = ["train.steps=8", "checkpoint.every=3 steps", "checkpoint.keep=9"]
    return [f"data.dir={data}", f"run.dir={folder}", *steps, HOOKS, *more]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with hooks that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (summary,) = world.run(1, run, asked(data, folder))
    assert "error" not in summary
    return folder


def test_hooks_follow_their_level_once_a_period_and_their_steps(whole: Path) -> None:
    found = records(whole, "evaluation")
    called = {
        name: [r["step"] for r in found if r["name"] == name] for name in ("average", "loss@steps")
    }
    # period 2, and its two blocks update in turn: at each step one, which begins an update of the
    # level at every other
    counts = [r["levels"]["level1"]["updates"] for r in records(whole, "train")]
    begun = [step for step, (a, b) in enumerate(itertools.pairwise([0, *counts]), 1) if b > a]
    assert called == {"average": begun, "loss@steps": [3, 5]} and begun == [1, 3, 5, 7, 8]


def test_a_run_that_goes_on_with_hooks_is_the_run_that_did_not_stop(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    start = whole / "checkpoints" / "step-00000006"
    (summary,) = world.run(1, run, asked(data, tmp_path, f"resume.start={start}"))
    assert "error" not in summary
    ends = [Store(each / "checkpoints").checkpoints()[-1] for each in (whole, tmp_path)]
    assert compare(*ends)["bitwise"]
    assert ends[0].state["noted"] == ends[1].state["noted"]
    assert ends[0].state["kept"] == ["average"]
    assert {f"average/{n}" for n in ("embedding.weight", "norm.weight")} <= ends[0].tensors().keys()
    losses = [[r["loss"] for r in records(each, "train")][-2:] for each in (whole, tmp_path)]
    assert losses[0] == losses[1]


def test_ranks_read_the_same_samples_again(data: Path, whole: Path, tmp_path: Path) -> None:
    results = world.run(2, run, asked(data, tmp_path))
    assert all("error" not in summary for summary in results)
    one, two = ([r["loss"] for r in records(each, "train")] for each in (whole, tmp_path))
    assert np.allclose(one, two, rtol=2e-4)
    states = [Store(each / "checkpoints").checkpoints()[-1].state for each in (whole, tmp_path)]
    assert states[0]["noted"] == states[1]["noted"]
    averages = [
        [r for r in records(e, "evaluation") if r["name"] == "average"] for e in (whole, tmp_path)
    ]
    assert np.allclose(*[[r["loss"] for r in each] for each in averages], rtol=2e-4)


def test_what_is_read_again_is_a_function_of_the_place() -> None:
    noted: dict[str, Any] = {}
    replay = Replay(noted, seed=5)
    assert replay.instead_of(range(4)) == range(4)
    replay.fill([3, 1, 2], share=0.25)
    at_once = list(replay.instead_of(range(100, 4100)))
    one_by_one = [Replay(noted, 5).instead_of([n])[0] for n in range(100, 4100)]
    assert at_once == one_by_one
    again = [n for n in at_once if n < 100]
    assert set(again) == {1, 2, 3} and abs(len(again) / 4000 - 0.25) < 0.03
    assert [n for n in at_once if n >= 100] == [
        n for n, m in zip(range(100, 4100), at_once, strict=True) if n == m
    ]
    assert list(Replay(noted, 6).instead_of(range(100, 4100))) != at_once


def test_a_reservoir_is_uniform_and_the_same_in_any_pieces() -> None:
    whole = reservoir([], range(1000), 64, seed=3)
    pieces: list[int] = []
    for begin in range(0, 1000, 50):
        pieces = reservoir(pieces, range(begin, begin + 50), 64, seed=3)
    assert pieces == whole and len(set(whole)) == 64
    late = np.mean([np.mean(np.array(reservoir([], range(1000), 64, s)) >= 500) for s in range(40)])
    assert abs(late - 0.5) < 0.05
    found = uniform(np.arange(20_000), 1, 1)
    assert abs(found.mean() - 0.5) < 0.01 and abs(found.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("{name: replays}", "hooks.0.name: no hook is called 'replays'; did you mean 'replay'?"),
        ("{name: replay, level: slow}", "hooks.0.level: no level is called 'slow'"),
        ("{name: replay, steps: [40]}", "step 40 comes after the end"),
        ("{name: replay, options: {sizes: 3}}", "unknown key 'sizes'; did you mean 'size'?"),
        ("{name: replay, options: {share: 2}}", "share is 2.0; it must be from 0 to 1"),
        ("{name: replay}, {name: replay}", "hooks.1: 'replay' is there twice"),
    ],
)
def test_hooks_that_cannot_be_called_are_refused(hook: str, said: str) -> None:
    config = recipe.load(None, [*SMALL, "data.dir=none", f"hooks=[{hook}]"]).config
    with pytest.raises(UserError, match=None) as raised:
        check(config, 1)
    assert said in str(raised.value)

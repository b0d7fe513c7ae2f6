"""When a run saves: every so many steps, tokens or minutes, and who decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nlscale.checkpoint import saver as saver_module
from nlscale.checkpoint.saver import Saver, saves
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.config.units import Interval
from nlscale.errors import UserError
from nlscale.step.trainer import Counters


def saver(*overrides: str, writer: bool = True) -> Saver:
    config = recipe.load(None, ["data.dir=none", *overrides]).config
    layout = SimpleNamespace(is_writer=writer, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(config=config, layout=layout)
    return Saver(trainer, {}, None, Store(Path("nowhere")), print)


def wanted(saver: Saver, steps: int, tokens_per_step: int = 100, dropped: int = 0) -> list[int]:
    """The steps after which it saves; `dropped` of the first steps were not admitted."""
    found = []
    for step in range(steps):
        counters = Counters(step=step, tokens=max(0, step - dropped) * tokens_per_step)
        if saver.wants(counters, tokens_per_step):
            found.append(step + 1)
    return found


def test_every_so_many_steps_and_at_steps_that_are_named() -> None:
    assert wanted(saver("checkpoint.every=4 steps"), 12) == [4, 8, 12]
    assert wanted(saver("checkpoint.every=4 steps", "checkpoint.steps=[5,8]"), 10) == [4, 5, 8]
    assert wanted(saver("checkpoint.every=null", "checkpoint.steps=[3]"), 10) == [3]
    assert wanted(saver("checkpoint.every=null"), 10) == []


def test_every_so_many_tokens() -> None:
    assert wanted(saver("checkpoint.every=250 tokens"), 10) == [3, 5, 8, 10]
    # tokens that were dropped do not count
    assert wanted(saver("checkpoint.every=250 tokens"), 6, dropped=1) == [4, 6]


def test_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now[0])
    mine = saver("checkpoint.every=1.5 minutes")
    counters = Counters(step=3)
    now[0] += 89
    assert not mine.wants(counters, 100)
    now[0] += 1
    assert mine.wants(counters, 100)


def test_only_the_first_rank_asks() -> None:
    assert wanted(saver("checkpoint.every=1 step", writer=False), 5) == []


def test_a_run_may_not_save_at_all() -> None:
    def configuration(*overrides: str) -> Any:
        return recipe.load(None, ["data.dir=none", *overrides]).config

    assert saves(configuration().checkpoint)
    assert not saves(configuration("checkpoint.every=null").checkpoint)
    assert saves(configuration("checkpoint.every=null", "checkpoint.steps=[7]").checkpoint)


@pytest.mark.parametrize("text", ["0 minutes", "soon", "0 steps", "1.5 steps", "-3 minutes", ""])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="30 minutes"):
        Interval.parse(text)

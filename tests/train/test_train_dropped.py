"""Why a run gives up, and what it advises; and the tokens of a step, counted."""

from __future__ import annotations

import math

import pytest

from nlscale.config import recipe
from nlscale.errors import TrainingFailed
from nlscale.parallel.consensus import Requests, Verdict
from nlscale.train.dropped import Drops

PLANNED = 32 * 512


def drops(*overrides: str) -> Drops:
    keys = ["data.dir=none", "data.sequence_length=512", "train.max_dropped_steps=3", *overrides]
    return Drops(recipe.load(None, keys).config)


def verdict(loss: float = 2.0, admitted: bool = False, **more: object) -> Verdict:
    known = {"tokens": PLANNED, "asked": Requests(), **more}
    return Verdict(loss=loss, admitted=admitted, **known)  # type: ignore[arg-type]


def said_of(seen: list[Verdict], *overrides: str, before: int = 0) -> str:
    watched = drops(*overrides)
    with pytest.raises(TrainingFailed) as gave_up:
        for number, each in enumerate(seen, 1):
            watched.see(each, 100 + number, before + number)
    assert gave_up.value.exit_code == 3 and "\n" not in str(gave_up.value)
    return str(gave_up.value)


def test_each_dropped_step_says_why() -> None:
    assert verdict(admitted=True).dropped_because is None
    assert verdict(math.nan, losses_not_finite=1).dropped_because == "loss not finite"
    assert verdict(2.0).dropped_because == "gradient not finite"
    assert verdict(5.0, limit=4.0).dropped_because == "spike: loss 5 above 4"


def test_losses_that_are_not_finite_mean_a_learning_rate_that_is_too_high() -> None:
    lost, gradient = verdict(math.nan, losses_not_finite=2), verdict(2.5)
    said = said_of([lost, lost, gradient])
    assert "loss not finite (2), gradient not finite (1), with finite losses of 2.5 to 2.5" in said
    assert "lower optimizer.learning_rate (0.001)" in said and "drop_spikes" not in said


def test_losses_that_hardly_moved_mean_a_limit_that_is_too_low() -> None:
    said = said_of([verdict(2.1, limit=2.0) for _ in range(3)], "train.drop_spikes=1.05")
    assert "spike (3), with finite losses of 2.1 to 2.1, above the limit of 2" in said
    assert "train.drop_spikes=1.05 is too low; raise it" in said
    assert "learning_rate" not in said and "not finite" not in said


def test_losses_that_rose_mean_a_learning_rate_that_is_too_high() -> None:
    said = said_of([verdict(9.0, limit=4.0) for _ in range(3)], "train.drop_spikes=2")
    assert "4.5 times the median" in said and "lower optimizer.learning_rate" in said


def test_what_was_dropped_before_this_start_is_counted_apart() -> None:
    said = said_of([verdict(math.nan, losses_not_finite=1)], before=2)
    assert "3 steps in a row were dropped, the last of them step 101" in said
    assert "loss not finite (1), before this start (2)" in said


def test_an_admitted_step_begins_to_count_anew_and_has_the_planned_tokens() -> None:
    watched = drops()
    for number in range(1, 9):
        watched.see(verdict(admitted=number % 3 == 0), number, number % 3)
    with pytest.raises(TrainingFailed, match=r"8,192 tokens instead of the 16,384 .*WORLD_SIZE"):
        watched.see(verdict(admitted=True, tokens=PLANNED // 2), 9, 0)
    drops().see(verdict(tokens=PLANNED // 2), 1, 1)  # of a step that was dropped it is no matter

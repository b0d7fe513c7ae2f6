"""The learning rate over a run."""

from __future__ import annotations

import itertools

import pytest

from nlscale.config.vocabulary import OptimizerConfig, Schedule
from nlscale.optim.schedule import learning_rate

PEAK, FLOOR = 2e-3, 0.1


def rates(schedule: Schedule, steps: int, warmup: int, decay: float = 0.2) -> list[float]:
    """The rate at the steps 1 .. steps."""
    config = OptimizerConfig(
        learning_rate=PEAK,
        min_learning_rate=FLOOR,
        schedule=schedule,
        warmup_steps=warmup,
        decay_fraction=decay,
    )
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def rises(values: list[float]) -> list[bool]:
    return [b > a for a, b in itertools.pairwise(values)]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (1000, 99), (3, 1), (2, 1)])
def test_up_to_the_peak_and_down_to_the_floor(schedule: Schedule, steps: int, warmup: int) -> None:
    values = rates(schedule, steps, warmup)
    assert max(values) <= PEAK * (1 + 1e-12)
    assert values[-1] == pytest.approx(PEAK * FLOOR)
    if warmup:
        assert values[0] == pytest.approx(PEAK / warmup)
        assert values[warmup - 1] == pytest.approx(PEAK)
    assert all(rises(values[:warmup])) and not any(rises(values[max(0, warmup - 1) :]))
    assert min(values) > 0


def test_warm_up_is_linear() -> None:
    assert rates(Schedule.cosine, 100, 10)[:10] == pytest.approx(
        [PEAK * i / 10 for i in range(1, 11)]
    )


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = rates(Schedule.cosine, 110, 10)
    assert values[60 - 1] == pytest.approx(PEAK * (1 + FLOOR) / 2)
    # the quarter points of a cosine lie (1 -+ sqrt(1/2)) / 2 from peak and floor
    assert values[35 - 1] == pytest.approx(PEAK * (FLOOR + (1 - FLOOR) * 0.8535533906))
    assert values[85 - 1] == pytest.approx(PEAK * (FLOOR + (1 - FLOOR) * 0.1464466094))


def test_wsd_is_stable_until_the_last_share_and_then_linear() -> None:
    values = rates(Schedule.wsd, 100, 10, decay=0.2)
    assert values[9:80] == pytest.approx([PEAK] * 71)
    falls = [a - b for a, b in itertools.pairwise(values[79:])]
    assert falls == pytest.approx([PEAK * (1 - FLOOR) / 20] * 20)


@pytest.mark.parametrize("schedule", Schedule)
def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak(schedule: Schedule) -> None:
    values = rates(schedule, 5, 100)
    assert values == pytest.approx([PEAK * i / 5 for i in range(1, 6)])
    assert rates(schedule, 1, 100) == pytest.approx([PEAK])

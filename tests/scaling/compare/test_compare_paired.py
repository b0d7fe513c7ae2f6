"""Stated error rates hold on made-up tables, and pairs are counted rightly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nlscale.scaling.compare.paired import FEWEST_TO_RESAMPLE, POWER, Paired, paired


def tables(
    count: int, pairs: int, effect: float, contrasts: int = 1, seed: int = 0
) -> list[list[Paired]]:
    """Differences of unit deviation around an effect, `contrasts` to a table that share a baseline,
    as the values of one factor do."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        baseline = generator.normal(size=pairs)
        rows = [generator.normal(effect, 1.0, pairs) - baseline for _ in range(contrasts)]
        made.append([paired(row / math.sqrt(2), 0.95, contrasts) for row in rows])
    return made


def at_most(rate: float, count: int) -> float:
    """That a true rate shows less often than one in 10^6 sets of tables."""
    return float(stats.binom.ppf(1 - 1e-6, count, rate)) / count


@pytest.mark.parametrize("pairs", [3, 5, 12])
def test_false_verdicts_are_as_rare_as_stated(pairs: int) -> None:
    made = tables(1000, pairs, effect=0.0)
    wrong = np.mean([one.verdict != "undecided" for (one,) in made])
    # exact for normal differences: neither more nor so few that the interval is too wide
    assert wrong <= at_most(0.05, 1000)
    assert wrong >= 0.05 - (at_most(0.05, 1000) - 0.05)


@pytest.mark.parametrize("pairs", [2, 3, 4])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_false_verdicts_are_rare_where_a_task_is_solved_or_not(pairs: int, share: float) -> None:
    """Figures of two values, which are far from normal."""
    generator = np.random.default_rng(2)
    solved = (generator.random((4000, 2, pairs)) < share).astype(float)
    wrong = np.mean([paired(x - y, 0.95).verdict != "undecided" for x, y in solved])
    assert wrong <= at_most(0.05, 4000)


@pytest.mark.parametrize("contrasts", [3, 6])
def test_a_table_of_several_is_wrong_no_more_often(contrasts: int) -> None:
    made = tables(1000, 4, effect=0.0, contrasts=contrasts)
    wrong = np.mean([any(one.verdict != "undecided" for one in table) for table in made])
    assert 0 < wrong <= at_most(0.05, 1000)
    # one looked at alone would be wrong more often, which is why the level is raised
    assert {one.level for table in made for one in table} == {1 - 0.05 / contrasts}


def test_the_pairs_that_are_asked_for_show_the_effect() -> None:
    deviation, effect = 1.0, 0.7
    known = paired([-deviation / math.sqrt(2), deviation / math.sqrt(2)], 0.95)
    assert known.deviation == pytest.approx(deviation)
    wanted = known.pairs_for(effect)
    assert wanted is not None
    found = np.mean(
        [one.verdict == "higher" for (one,) in tables(1000, wanted, effect * math.sqrt(2))]
    )
    few = np.mean(
        [one.verdict == "higher" for (one,) in tables(1000, wanted // 2, effect * 2**0.5)]
    )
    slack = at_most(1 - POWER, 1000) - (1 - POWER)
    assert found >= POWER - slack and few < POWER - slack


def test_what_is_visible_is_what_so_many_pairs_would_show() -> None:
    made = paired(np.random.default_rng(1).normal(0, 0.02, 6), 0.95)
    visible = made.visible()
    assert visible is not None
    assert made.pairs_for(visible * 1.0001) == 6 and made.pairs_for(visible * 0.999) == 7


def test_verdicts_and_intervals() -> None:
    one = paired([0.5], 0.95)
    assert one.verdict == "undecided" and one.interval is None and one.visible() is None
    assert one.pairs_for(0.1) is None
    assert paired([0.1, 0.1], 0.95).verdict == "undecided"
    two = paired([-0.11, -0.1, -0.12], 0.95)
    low, high = stats.ttest_1samp([-0.11, -0.1, -0.12], 0).confidence_interval(0.95)
    assert two.verdict == "lower" and two.interval == pytest.approx((low, high))
    assert two.resampled is None
    same = paired([0.25] * 4, 0.95)
    assert same.verdict == "higher" and same.interval == (0.25, 0.25) and same.visible() is None
    many = paired([float(x) for x in range(FEWEST_TO_RESAMPLE)], 0.95)
    assert many.resampled is not None and many.interval is not None
    assert many.interval[0] < many.resampled[0] < many.mean < many.resampled[1]
    assert many == paired(many.differences, 0.95), "the same answer to the same question"

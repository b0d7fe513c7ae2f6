"""Intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from nlscale.evaluate.intervals import Share


def test_targets_that_go_right_together_are_not_taken_for_independent() -> None:
    rng, tries, holding, alone = np.random.default_rng(5), 400, 0, 0
    for _ in range(tries):
        ease = rng.beta(0.7, 0.3, size=256)  # of an example: 0.7 in the mean
        counted = rng.integers(8, 24, size=256)
        right = rng.binomial(counted, ease)
        low, high = Share.of_groups(right.tolist(), counted.tolist()).interval
        holding += low <= 0.7 <= high
        low, high = Share(int(right.sum()), int(counted.sum())).interval
        alone += low <= 0.7 <= high
    fewest, most = binom.ppf([1e-4, 1 - 1e-4], tries, 0.95)
    assert fewest <= holding <= most
    assert alone < fewest, "else this shows nothing"


def test_all_or_none_right_leave_room_by_the_number_of_examples() -> None:
    assert Share.of_groups([4] * 20, [4] * 20).interval == Share(20, 20).interval
    assert Share.of_groups([0] * 20, [4] * 20).interval == Share(0, 20).interval
    assert Share.of_groups([1, 0, 1, 1], [1] * 4).interval[0] < 0.75

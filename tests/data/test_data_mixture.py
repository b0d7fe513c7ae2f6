"""The order of a mixture, held to one that is written down place by place with fractions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from nlscale.data.apportion import MOST_PARTS, parts_of, period
from nlscale.data.mixture import Mixture, Segment
from nlscale.data.order import SampleOrder

SEED = 7


def test_weights_are_kept_as_they_were_typed() -> None:
    assert parts_of([Fraction("0.6"), Fraction("0.3")]) == ([2, 1], True)
    assert parts_of([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == ([7, 2, 1], True)
    assert parts_of([Fraction(5)]) == ([1], True)


def test_weights_of_too_long_a_period_are_rounded_by_largest_remainders() -> None:
    weights = [Fraction(1, 65_537), Fraction(2, 3), Fraction(10, 31)]
    parts, exact = parts_of(weights)
    shares = [weight / sum(weights) * MOST_PARTS for weight in weights]
    assert not exact and sum(parts) == MOST_PARTS
    assert all(abs(part - share) < 1 for part, share in zip(parts, shares, strict=True))
    rests = [share - floor(share) for share in shares]
    up = {i for i, part in enumerate(parts) if part > shares[i]}
    assert up == set(sorted(range(3), key=lambda i: -rests[i])[: len(up)])
    assert parts_of([Fraction(1, 200_000), Fraction(1)])[0] == [0, MOST_PARTS]


@pytest.mark.parametrize("weights", [[], [Fraction(1), Fraction(0)], [Fraction(-1)]])
def test_what_is_no_weight_is_refused(weights: list[Fraction]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        parts_of(weights)


def test_every_prefix_is_within_one_place_of_the_weights() -> None:
    draw = random.Random(0)
    some = [[1], [1, 1], [1, 999], [999, 1, 1], [2, 3, 5, 7, 11, 13], [1] * 30 + [170]]
    more = [[draw.randint(1, 90) for _ in range(draw.randint(2, 7))] for _ in range(20)]
    for parts in [*some, *more]:
        size, order = sum(parts), period(parts)
        weights = [Fraction(part, size) for part in parts]
        counts = [0] * len(parts)
        for n, source in enumerate(order.tolist(), 1):
            counts[source] += 1
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - n * weight) < 1, (parts, n)
        assert counts == parts


def test_a_large_period_is_within_one_place_too() -> None:
    parts = [40_000, 20_003, 5_000, 500, 32, 1]
    order = period(parts)
    for source, part in enumerate(parts):
        counts = np.cumsum(order == source)
        off = np.abs(counts * len(order) - np.arange(1, len(order) + 1) * part)
        assert off.max() < len(order)


def slowly(
    lengths: Sequence[int], segments: Sequence[Segment], samples: int, seed: int = SEED
) -> list[tuple[int, int]]:
    """Source and sample of each number: which place is due first, looked for anew each time."""
    counts, found = [0] * len(lengths), []
    segment, begun, before, going = segments[0], 0, list(counts), None
    for number in range(samples):
        segment = [each for each in segments if each.first_sample <= number][-1]
        left = tuple(
            part if limit is None or count < limit else 0
            for part, limit, count in zip(segment.parts, segment.limits, counts, strict=True)
        )
        if left != going or segment.first_sample == number:
            begun, before, going = number, list(counts), left
        if not any(left):
            break
        place, due = number - begun + 1, {}
        for i, part in enumerate(left):
            if part:
                weight, nth = Fraction(part, sum(left)), counts[i] - before[i] + 1
                if (nth - 1) / weight < place:
                    due[i] = ceil(nth / weight)
        source = min(due, key=lambda i: (due[i], i))
        epoch, at = divmod(counts[source], lengths[source])
        found.append((source, SampleOrder(lengths[source], seed)[epoch * lengths[source] + at]))
        counts[source] += 1
    return found


FREE = (None, None, None)
CASES = {
    "one": ([13], [Segment(0, (1,), (None,))]),
    "two": ([13, 40], [Segment(0, (2, 1), (None, None))]),
    "equal lengths": ([17, 17], [Segment(0, (1, 3), (None, None))]),
    "limits": ([10, 7, 50], [Segment(0, (30, 15, 8), (20, 7, None))]),
    "all end": ([10, 7], [Segment(0, (3, 2), (30, 14))]),
    "end before a segment": ([5], [Segment(0, (1,), (5,)), Segment(8, (1,), (None,))]),
    "end with a segment": (
        [5, 7],
        [Segment(0, (1, 2), (None, 14)), Segment(30, (0, 1), (None, 14))],
    ),
    "changed": (
        [10, 7, 5],
        [Segment(0, (3, 2, 0), FREE), Segment(41, (3, 2, 4), FREE), Segment(120, (0, 1, 1), FREE)],
    ),
    "changed, limits": (
        [10, 7, 5],
        [
            Segment(0, (3, 2, 1), (None, 14, 5)),
            Segment(60, (1, 5, 1), (None, 14, 20)),
            Segment(61, (2, 1, 1), (None, 28, 20)),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_that_of_the_slow_list(case: str) -> None:
    lengths, segments = CASES[case]
    expected = slowly(lengths, segments, 200)
    mixture = Mixture(lengths, segments, SEED, 200)
    assert mixture.ends == (None if len(expected) == 200 else len(expected))
    for first in range(0, len(expected), 7):
        count = min(1 + first % 23, len(expected) - first)
        sources, samples = mixture.take(first, count)
        found = list(zip(sources.tolist(), samples.tolist(), strict=True))
        assert found == expected[first : first + count], first
    for n in range(len(expected) + 1):
        counts = Counter(source for source, _ in expected[:n])
        assert mixture.counts(n).tolist() == [counts[i] for i in range(len(lengths))]
    with pytest.raises(ValueError, match="not among 0 to"):
        mixture.take(len(expected) - 1, 2)


@pytest.mark.parametrize("case", CASES)
def test_no_sample_comes_twice_in_an_epoch_of_its_source(case: str) -> None:
    lengths, segments = CASES[case]
    mixture = Mixture(lengths, segments, SEED, 200)
    sources, samples = mixture.take(0, 200 if mixture.ends is None else mixture.ends)
    for source, length in enumerate(lengths):
        own = samples[sources == source].tolist()
        epochs = [own[i : i + length] for i in range(0, len(own), length)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs[:-1])


def test_limits_are_where_sources_end() -> None:
    lengths, segments = CASES["limits"]
    mixture = Mixture(lengths, segments, SEED, 200)
    for source, limit in ((0, 20), (1, 7)):
        end = mixture.ended[source]
        assert mixture.counts(end)[source] == limit == mixture.counts(end - 1)[source] + 1
        assert mixture.counts(200)[source] == limit
    assert mixture.ended.keys() == {0, 1}


def test_a_limit_below_what_was_read_ends_a_source_with_its_segment() -> None:
    segments = [Segment(0, (1, 1), (None, None)), Segment(30, (1, 1), (10, None))]
    mixture = Mixture([10, 50], segments, SEED, 60)
    assert mixture.counts(30).tolist() == [15, 15] and mixture.counts(60).tolist() == [15, 45]
    assert mixture.ended == {0: 30}
    # and one that had ended before, when it did
    lower = [Segment(0, (1, 1), (10, None)), Segment(30, (1, 1), (5, None))]
    assert Mixture([10, 50], lower, SEED, 60).ended == Mixture([10, 50], lower[:1], SEED, 60).ended


def test_what_is_no_history_is_refused() -> None:
    one = (1,), (None,)
    for segments in ([], [Segment(1, *one)], [Segment(0, *one), Segment(0, *one)]):
        with pytest.raises(ValueError, match="segments begin at"):
            Mixture([5], segments, SEED, 10)
    with pytest.raises(ValueError, match="not of 2 sources"):
        Mixture([5, 5], [Segment(0, *one)], SEED, 10)
    with pytest.raises(ValueError, match="anything to read"):
        Mixture([5], [Segment(0, (0,), (None,))], SEED, 10)

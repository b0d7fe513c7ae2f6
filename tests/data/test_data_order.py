"""The sample order: a permutation an epoch, and a pure function of seed and number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nlscale.data import SampleOrder
from nlscale.data.order import seed_of_cut


@pytest.mark.parametrize("samples", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4099, 65537])
def test_every_epoch_is_a_permutation(samples: int) -> None:
    order = SampleOrder(samples, seed=3)
    for epoch in (0, 1, 2, 1000):
        taken = order.take(epoch * samples, samples)
        assert taken.dtype == np.int64
        assert sorted(taken) == list(range(samples))


def test_epochs_and_seeds_differ() -> None:
    keys = itertools.product((0, 1, 2, -1, 2**63), (0, 1, 2))
    orders = {tuple(SampleOrder(50, seed).take(epoch * 50, 50)) for seed, epoch in keys}
    assert len(orders) == 15


def test_order_does_not_depend_on_how_it_is_asked_for() -> None:
    order = SampleOrder(37, seed=5)
    whole = order.take(0, 400)
    assert np.array_equal(whole, np.concatenate([order.take(i, 50) for i in range(0, 400, 50)]))
    assert [order[i] for i in range(400)] == whole.tolist()
    assert order.take(17, 0).shape == (0,)
    far = 10**15
    assert SampleOrder(10**12 + 7, 1)[far] == SampleOrder(10**12 + 7, 1).take(far - 3, 9)[3]


def test_order_is_the_one_that_earlier_runs_used() -> None:
    """A change here would silently change the data order of every resumed run."""
    golden = [7, 9, 3, 1, 5, 6, 2, 4, 8, 0, 4, 5, 9, 3, 0, 7, 2, 8, 1, 6]
    assert SampleOrder(10, seed=0).take(0, 20).tolist() == golden


def test_small_permutations_are_all_reached_about_equally() -> None:
    epochs, samples = 12000, 4
    taken = SampleOrder(samples, seed=11).take(0, epochs * samples).reshape(epochs, samples)
    _, counts = np.unique(taken, axis=0, return_counts=True)
    assert len(counts) == 24
    expected = epochs / 24
    # chi-square with 23 degrees of freedom: beyond 60 about once in 30,000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < 60


def test_neighbours_in_the_order_are_not_neighbours_in_the_data() -> None:
    samples = 10000
    taken = SampleOrder(samples, seed=2).take(0, samples)
    assert abs(np.corrcoef(taken[:-1], taken[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(taken, np.arange(samples))[0, 1]) < 0.05


@pytest.mark.parametrize("samples", [0, -1, 2**62])
def test_impossible_sizes_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        SampleOrder(samples, seed=0)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        SampleOrder(5, seed=0).take(-1, 2)


def test_every_cut_of_the_data_has_an_order_of_its_own() -> None:
    seeds = [seed_of_cut(1234, cut) for cut in range(8)]
    assert seeds[0] == 1234 and len(set(seeds)) == 8
    assert not {seed_of_cut(1235, cut) for cut in range(8)} & set(seeds)
    orders = [SampleOrder(500, seed).take(0, 500).tolist() for seed in seeds]
    assert all(sorted(order) == list(range(500)) for order in orders)
    for cut in range(1, 8):  # two random permutations agree in one place or so
        assert sum(a == b for a, b in zip(orders[0], orders[cut], strict=True)) < 10

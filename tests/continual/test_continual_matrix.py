"""What is read off a matrix of results, on matrices worked by hand."""

from __future__ import annotations

import pytest

from nlscale.continual.matrix import Matrix, differences, over_seeds

# three tasks; accuracies in eighths
ACCURACY = Matrix(
    [1 / 8, 2 / 8, 0], [[6 / 8, 3 / 8, 0], [7 / 8, 5 / 8, 1 / 8], [4 / 8, 2 / 8, 1]], True
)
LOSS = Matrix([8, 8, 8], [[2, 6, 7], [5, 3, 9], [4, 3.5, 1]], False)


def test_accuracies() -> None:
    assert ACCURACY.average() == pytest.approx((4 + 2 + 8) / 24)
    assert ACCURACY.learned() == pytest.approx((6 + 5 + 8) / 24)
    # the first was best after the second task; the second after its own
    assert ACCURACY.forgetting() == pytest.approx(((7 - 4) + (5 - 2)) / 16)
    assert ACCURACY.backward() == pytest.approx(((4 - 6) + (2 - 5)) / 16)
    assert ACCURACY.forward() == pytest.approx(((3 - 2) + (1 - 0)) / 16)


def test_of_losses_the_signs_turn() -> None:
    assert LOSS.average() == pytest.approx((4 + 3.5 + 1) / 3)
    assert LOSS.learned() == 2
    assert LOSS.forgetting() == pytest.approx(((4 - 2) + (3.5 - 3)) / 2)
    assert LOSS.backward() == pytest.approx(-LOSS.forgetting())
    assert LOSS.forward() == pytest.approx(((8 - 6) + (8 - 9)) / 2)
    turned = Matrix([-x for x in LOSS.before], [[-x for x in row] for row in LOSS.rows], True)
    for name in ("forgetting", "backward", "forward"):
        assert turned.figures()[name] == pytest.approx(LOSS.figures()[name])


def test_what_later_tasks_bring_is_no_forgetting() -> None:
    found = Matrix([3, 3], [[2, 3], [1, 2]], False)
    assert found.backward() == 1 and found.forgetting() == -1


def test_intervals_are_over_seeds_and_pairs_are_of_one_seed() -> None:
    one = over_seeds([2.0])
    assert one == {"mean": 2.0, "interval": None, "seeds": 1}
    found = over_seeds([1.0, 2.0, 3.0])
    # Student's t of two degrees of freedom, 4.3027, times 1 / sqrt(3)
    low, high = found["interval"]  # type: ignore[misc]
    assert found["mean"] == 2.0 and (high - low) / 2 == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert differences({"a": 3.0, "b": 5.0, "c": 1.0}, {"b": 4.0, "a": 1.0}) == [2.0, 1.0]

"""The orthogonal matrix next to a matrix, by products alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nlscale.config.choices import NewtonSchulz
from nlscale.ops.newton_schulz import COEFFICIENTS, orthogonalized

SHAPES = [(40, 64), (64, 40), (32, 32), (1, 30), (30, 1), (1, 1)]


def polynomial(values: Tensor, kind: NewtonSchulz, iterations: int) -> Tensor:
    """What the iteration makes of singular values that are at most 1."""
    steps = COEFFICIENTS[kind]
    for i in range(iterations):
        a, b, c = steps[min(i, len(steps) - 1)]
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("kind", NewtonSchulz)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_move_and_vectors_stay(kind: NewtonSchulz, shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    norm = torch.linalg.matrix_norm(x)[:, None] * (1.01 if kind == "polar-express" else 1)
    want = u * polynomial(s / norm, kind, 5)[:, None] @ v
    assert (orthogonalized(x, kind, 5, torch.float64) - want).norm() <= 1e-12 * want.norm()
    in_fp32 = orthogonalized(x, kind, 5, torch.float32)
    assert in_fp32.dtype == torch.float32
    # an error of one ulp grows with the slope at 0, 3.4^5 or 8.3 x 4.1 x 3.9 x 3.3 x 2.3
    assert (in_fp32 - want).norm() <= 1100 * 2**-24 * want.norm()


def test_more_iterations_of_polar_express_reach_the_orthogonal_matrix() -> None:
    x = torch.randn(2, 24, 40, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalized(x, NewtonSchulz.polar_express, 9, torch.float64)
    assert (found - u @ v).norm() <= 1e-6 * (u @ v).norm()


@pytest.mark.parametrize("kind", NewtonSchulz)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_no_direction_stays_nothing_and_what_has_one_keeps_it(
    kind: NewtonSchulz, dtype: torch.dtype
) -> None:
    zero = torch.zeros(2, 8, 6)
    assert not orthogonalized(zero, kind, 5, dtype).any()
    left, right = torch.randn(8), torch.randn(6)
    for size in (1e-20, 1.0, 1e15):  # of a matrix of rank one
        matrix = size * torch.outer(left, right)
        found = orthogonalized(matrix[None], kind, 5, dtype)[0].float()
        s = torch.linalg.svdvals(found)
        assert torch.isfinite(found).all()
        if size > 1e-7:
            assert 0.65 <= s[0] <= 1.25
            # Rounding is of full rank, and grows with the slope at 0: by some 1100 at most, which
            # in bf16 brings it to 1 as well.
            assert s[1] <= (1e-3 if dtype == torch.float32 else 1.25)


def test_a_matrix_that_is_not_finite_spoils_itself_alone() -> None:
    x = torch.randn(2, 4, 4)
    x[0, 1, 1] = float("nan")
    found = orthogonalized(x, NewtonSchulz.keller, 5, torch.float32)
    assert found[0].isnan().all() and found[1].isfinite().all()

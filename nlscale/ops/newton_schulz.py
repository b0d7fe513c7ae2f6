"""Newton-Schulz: the orthogonal matrix next to a matrix, by products alone.

With G = U S V^T, an odd polynomial of the matrix is U p(S) V^T; iterated, p brings all singular
values near 1. Each step is

    A = X X^T        X <- a X + (b A + c A^2) X

of X = G / |G|, so that singular values begin at most 1. A matrix that is zero stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-7
"""Least norm that is divided by."""

_KELLER = [(3.4445, -4.7750, 2.0315)]
_POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
_SAFETY = 1.01
"""By which polar-express's polynomials are stretched, so that rounding carries no singular value
beyond where they hold."""


def _stretched(steps: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    s = _SAFETY
    return [(a / s, b / s**3, c / s**5) for a, b, c in steps[:-1]] + steps[-1:]


_SAFE = {"keller": 1.0, "polar-express": _SAFETY}
COEFFICIENTS = {"keller": _KELLER, "polar-express": _stretched(_POLAR_EXPRESS)}
"""(a, b, c) of each step; further steps have those of the last."""


def orthogonalized(
    matrices: Tensor, coefficients: str, iterations: int, dtype: torch.dtype
) -> Tensor:
    """The matrices with their singular values brought near 1.

    Args:
        matrices: [..., out, in].
        coefficients: `keller` or `polar-express`.
        iterations: steps.
        dtype: in which products are taken.

    Returns:
        [..., out, in], in that dtype. One ulp of the input moves it by some 1e-6 in fp32, by 1e-2
        in bf16.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.to(torch.promote_types(dtype, torch.float32))
    x = wide.mT if tall else wide
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS) * _SAFE[coefficients]
    steps = COEFFICIENTS[coefficients]
    x = (x / norm).to(dtype)
    for i in range(iterations):
        a, b, c = steps[min(i, len(steps) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x

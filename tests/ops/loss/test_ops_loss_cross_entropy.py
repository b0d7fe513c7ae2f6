"""Cross entropy with the vocabulary split, and its kernels, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.interpreter import Call
from torch import Tensor

from nlscale.ops.loss import cross_entropy

ROWS, COLUMNS = 7, 300


def problem(case: str = "") -> tuple[Tensor, Tensor]:
    """float64 logits and targets."""
    logits = 5 * torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    if case == "large":
        logits = logits * 1e3
    elif case == "equal":
        logits = torch.full_like(logits, -40.0)
    targets = torch.randint(COLUMNS, (ROWS,))
    return infinite(logits, targets) if case == "infinite" else (logits, targets)


def infinite(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Three rows with a finite loss, one of +inf, and three without a meaning: NaN."""
    minus, ends = -float("inf"), torch.tensor([200, 10, 299, 130])
    logits[0, :150] = minus  # the first tile, and the first of three parts
    logits[1, 100:250] = minus  # the second part
    logits[2, :299] = minus  # all but the target
    logits[3, 120:140] = minus  # the target among them
    logits[4] = minus
    logits[5, :150] = minus
    logits[5, 3] = float("nan")
    logits[6, 290] = float("inf")
    return logits, torch.cat([ends, targets[4:]])


def by_parts(
    logits: Tensor, targets: Tensor, d_loss: Tensor, split: list[int], z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses, and derivatives by the logits, as ranks compute them that hold so many columns."""
    parts = [x.clone() for x in logits.detach().split(split, -1)]
    firsts = torch.tensor([0, *split]).cumsum(0)[:-1].tolist()
    found = [
        cross_entropy.row_statistics(x, targets - first)
        for x, first in zip(parts, firsts, strict=True)
    ]
    most = torch.stack([largest for largest, _, _ in found]).amax(0)
    base = cross_entropy.base(most)
    total = sum(total * torch.exp(largest - base) for largest, total, _ in found)
    log_sum = most + torch.as_tensor(total).log()
    for x, first in zip(parts, firsts, strict=True):
        cross_entropy.to_gradient_(x, targets - first, log_sum, d_loss.to(log_sum.dtype), z_loss)
    return log_sum - sum(at_target for _, _, at_target in found), torch.cat(parts, -1)


def compare(seed: int, case: str, split: list[int], dtype: torch.dtype, kernels: bool) -> None:
    """Against float64, within what rounding can do.

    The log sum, the distance of a logit from it and the loss are numbers of the size of the logits,
    each rounded once or twice; exp turns their absolute error into a relative one of a probability.
    Probabilities of a row sum to 1, so that this is all the error of the row's gradient, but for
    the rounding of what is written. 16 epsilon are for exp, log and the sum over 300 columns.
    """
    torch.manual_seed(seed)
    cross_entropy.supports = lambda logits: kernels  # type: ignore[assignment]
    logits, targets = problem(case)
    low = logits.to(dtype)
    exact = low.double().requires_grad_()
    d_loss = torch.randn(ROWS, dtype=torch.float64)
    want = F.cross_entropy(exact, targets, reduction="none")
    z_loss = 0.1 if case == "z-loss" else 0.0
    differentiated = want + z_loss * exact.logsumexp(-1) ** 2 if z_loss else want
    (d_want,) = torch.autograd.grad((differentiated * d_loss).sum(), exact)
    losses, d_logits = by_parts(low, targets, d_loss, split, z_loss)
    assert losses.dtype == torch.promote_types(dtype, torch.float32) and d_logits.dtype == dtype
    assert torch.equal(losses.isnan(), want.isnan()) and torch.equal(losses.isinf(), want.isinf())
    assert torch.equal(d_logits.isnan(), d_want.isnan())
    finite, known = want.isfinite(), ~d_want.isnan()
    losses, want, d_logits, d_want = losses[finite], want[finite], d_logits[known], d_want[known]
    scale = float(exact.detach().nan_to_num(0, 0, 0).abs().amax())
    epsilon, rounded = torch.finfo(losses.dtype).eps, torch.finfo(dtype).eps / 2
    assert (losses.double() - want).abs().max() <= epsilon * (2 * scale + 16)
    of_exp = epsilon * (scale + 16)
    assert (d_logits.double() - d_want).norm() <= rounded * d_want.norm() + of_exp * d_loss.norm()


@pytest.mark.parametrize("case", ["", "large", "equal", "infinite", "z-loss"])
@pytest.mark.parametrize("split", [[300], [100, 150, 50]], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_form(
    case: str, split: list[int], dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK", 2 * COLUMNS)  # several blocks, and a rest
    monkeypatch.setattr(cross_entropy, "supports", cross_entropy.supports)  # put back at the end
    compare(seed, case, split, dtype, kernels=False)


def with_several_tiles(*given: Any) -> None:
    """In the process of the interpreter: rows that take three tiles, the last not full."""
    from nlscale.ops.loss import kernel as fused

    fused._COLUMNS = 128
    compare(*given, kernels=True)


@pytest.mark.parametrize("case", ["", "large", "equal", "infinite", "z-loss"])
@pytest.mark.parametrize("split", [[300], [100, 150, 50]], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(
    case: str, split: list[int], dtype: torch.dtype, seed: int, interpreted: Call
) -> None:
    interpreted(with_several_tiles, seed, case, split, dtype)

"""The loss of logits that are split over ranks, and what it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world

SEQUENCE, BATCH, VOCABULARY = 5, 3, 24
MEANINGLESS = (2, 0)
"""A token of which all logits are -inf."""


def losses(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """On each rank: the losses, the derivative by its part of the logits, and the collectives."""
    from nlscale.config import recipe
    from nlscale.model import loss
    from nlscale.model.layers import vocabulary_group
    from nlscale.parallel.layout import process_groups

    logits, targets, weight = problem(seed)
    ranks = int(os.environ["WORLD_SIZE"])
    with process_groups(recipe.load(None, ["data.dir=none", f"parallel.tensor={ranks}"]).config):
        group = vocabulary_group()
        own = logits.chunk(ranks, -1)[group.rank()].to(dtype).requires_grad_()
        loss.dist = counting = Counting()  # type: ignore[assignment]
        found = loss.cross_entropy(own.clone(), targets, group)
        (d_own,) = torch.autograd.grad((found * weight).sum(), own)
        return found.detach(), d_own, counting.calls


class Counting:
    """torch.distributed, noting what is called of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return getattr(dist, name)(*args, **kwargs)

        return call


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With tokens of which the logits of whole ranks are -inf, and one without a meaning."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCE, BATCH)
    logits = 4 * torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    logits[0, 0, :-1] = logits[1, 0, 1:] = logits[MEANINGLESS] = -float("inf")
    targets[0, 0], targets[1, 0] = VOCABULARY - 1, 0
    return logits, targets, torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ranks", "dtype", "bound"),
    [(2, torch.float64, 1e-12), (2, torch.bfloat16, 1e-2), (3, torch.float32, 1e-6)],
)
def test_ranks_that_share_the_vocabulary_have_the_loss_of_all_of_it(
    ranks: int, dtype: torch.dtype, bound: float
) -> None:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")  # shown when the test fails
    logits, targets, weight = problem(seed)
    exact = logits.to(dtype).double().requires_grad_()
    want = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none").view_as(weight)
    (d_want,) = torch.autograd.grad((want * weight).sum(), exact)
    found, derivatives, collectives = zip(*world.run(ranks, losses, seed, dtype), strict=True)
    bits = [loss.numpy().tobytes() for loss in found]  # equal, NaN or not
    assert bits == [bits[0]] * ranks
    assert list(collectives) == [["all_gather_into_tensor"]] * ranks
    d_found = torch.cat(derivatives, -1)
    assert found[0][MEANINGLESS].isnan() and d_found[MEANINGLESS].isnan().all()
    finite = torch.ones(SEQUENCE, BATCH, dtype=torch.bool)
    finite[MEANINGLESS] = False
    assert torch.allclose(found[0][finite].double(), want[finite], rtol=1e-6, atol=1e-6)
    assert (d_found - d_want)[finite].norm() <= bound * d_want[finite].norm()


def test_logits_are_kept_once_and_only_differentiated_once() -> None:
    from nlscale.config import recipe
    from nlscale.model.layers import vocabulary_group
    from nlscale.model.loss import cross_entropy
    from nlscale.parallel.layout import process_groups

    logits, targets, _ = problem(1)
    leaf = logits.bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with process_groups(recipe.load(None, ["data.dir=none"]).config):
        made = leaf * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = cross_entropy(made, targets, vocabulary_group()).sum()
        of_vocabulary = [x for x in kept if x.numel() >= logits.numel()]
        assert [x.data_ptr() for x in of_vocabulary] == [made.data_ptr()]
        loss = cross_entropy(made, targets, vocabulary_group()).sum()
        (first,) = torch.autograd.grad(loss, made, retain_graph=True)
        assert first.data_ptr() == made.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, made)

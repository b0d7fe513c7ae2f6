"""The loss of logits that are split over ranks, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import world

SEQUENCE, BATCH, VOCABULARY = 5, 3, 24


def losses(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """On each rank: the losses, and the derivative by its part of the logits."""
    from nlscale.config import recipe
    from nlscale.model.layers import vocabulary_group
    from nlscale.model.loss import cross_entropy
    from nlscale.parallel.layout import process_groups

    logits, targets, weight = problem(seed)
    with process_groups(recipe.load(None, ["data.dir=none", "parallel.tensor=2"]).config):
        group = vocabulary_group()
        own = logits.chunk(2, -1)[group.rank()].to(dtype).requires_grad_()
        found = cross_entropy(own.clone(), targets, group)
        (d_own,) = torch.autograd.grad((found * weight).sum(), own)
        return found.detach(), d_own


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCE, BATCH)
    logits = 4 * torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    return logits, targets, torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_ranks_that_share_the_vocabulary_have_the_loss_of_all_of_it(
    dtype: torch.dtype, bound: float
) -> None:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")  # shown when the test fails
    logits, targets, weight = problem(seed)
    exact = logits.to(dtype).double().requires_grad_()
    want = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none")
    (d_want,) = torch.autograd.grad((want * weight.flatten()).sum(), exact)
    (first, d_first), (second, d_second) = world.run(2, losses, seed, dtype)
    assert torch.equal(first, second)
    assert torch.allclose(first.flatten().double(), want, rtol=1e-6, atol=1e-6)
    d_found = torch.cat([d_first, d_second], -1)
    assert (d_found - d_want).norm() <= bound * d_want.norm()


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

"""`data.document_mask`: a model does not see one document from another of the same row."""

from __future__ import annotations

import pytest
import torch
from model.conftest import VOCABULARY, Build

from nlscale.ops.documents import Documents

SEPARATOR = VOCABULARY - 1
STARTS = (0, 9, 10, 21)


@pytest.fixture
def row() -> torch.Tensor:
    """One row of tokens; documents begin at STARTS."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SEPARATOR, (1, 27), generator=generator)
    tokens[0, list(STARTS)[1:]] = SEPARATOR
    return tokens


def gradients(model: torch.nn.Module, losses: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(losses.sum(), list(model.parameters())))


@pytest.mark.parametrize("recompute", ["[]", "[mixer,cms]"])
def test_losses_and_gradients_are_those_of_the_documents_alone(
    build: Build, mixer: str, row: torch.Tensor, recompute: str
) -> None:
    model = build(mixer, f"train.recompute={recompute}").double()
    tokens, targets = row[:, :-1], row[:, 1:]
    where = Documents.of(tokens.numpy(), SEPARATOR, 4, torch.device("cpu"))
    losses = model(tokens, targets, where)
    ends = [*STARTS[1:], tokens.shape[1]]
    alone = torch.cat(
        [model(tokens[:, a:b], targets[:, a:b]) for a, b in zip(STARTS, ends, strict=True)]
    )
    assert torch.allclose(losses, alone, rtol=1e-10, atol=1e-10)
    for got, want in zip(gradients(model, losses), gradients(model, alone), strict=True):
        assert (got - want).norm() <= 1e-7 * want.norm() + 1e-12


def test_without_the_mask_it_does_see_them(build: Build, mixer: str, row: torch.Tensor) -> None:
    model = build(mixer).double()
    tokens, targets = row[:, :-1], row[:, 1:]
    where = Documents.of(tokens.numpy(), SEPARATOR, 4, torch.device("cpu"))
    apart = (model(tokens, targets) - model(tokens, targets, where)).abs()
    assert apart[: STARTS[1]].max() < 1e-10 and apart[STARTS[1] :].max() > 1e-4

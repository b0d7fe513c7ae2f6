"""Keys and values that are carried where gradients are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nlscale.model.decoder import Decoder

KEYS = ["model.mixer=attention", "model.heads=4", "model.attention.kv_heads=2"]


def gradients(model: Decoder, out: Tensor) -> list[Tensor]:
    """Of a sum that weighs all that a piece gives, by each parameter that has a say in it."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@torch.no_grad()
def read(model: Decoder, tokens: Tensor, cuts: list[int]) -> Any:
    states = None
    for piece in tokens.split(cuts, 1):
        _, states = model.hidden(piece, states)
    return states


@pytest.mark.parametrize("recompute", ["[]", "[mixer]"])
def test_a_piece_with_gradients_after_some_without(build, tokens, recompute: str) -> None:
    model = build(*KEYS, f"train.recompute={recompute}").double()
    whole = model.hidden(tokens)[0]
    wanted = gradients(model, model.hidden(tokens[:, 11:17], read(model, tokens[:, :11], [11]))[0])
    states = read(model, tokens[:, :11], [9, 1, 1])  # with room for more than there is
    assert states["0"].keys.shape[2] > 11
    for _ in range(2):  # it leaves what it goes on from as it is
        out, after = model.hidden(tokens[:, 11:17], states)
        with torch.no_grad():  # nor does what is read next change what the backward pass wants
            next_, _ = model.hidden(tokens[:, 17:], after)
        assert_same(gradients(model, out), wanted)
        found = torch.cat([out, next_])
        assert (found - whole[11:]).abs().max() < 1e-12 * whole.abs().max()
        assert states["0"].lengths.tolist() == [11] * 3


@pytest.mark.parametrize("keys", [KEYS, KEYS[:1]], ids=["grouped", "each"])
@pytest.mark.parametrize("recompute", ["[]", "[mixer]"])
def test_rows_of_different_lengths_have_the_gradients_of_each(
    build, tokens, keys: list[str], recompute: str
) -> None:
    model = build(*keys, f"train.recompute={recompute}").double()
    first, second = [5, 2, 4], [1, 3, 3]
    weight = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32)

    def of(rows: list[Tensor]) -> list[Tensor]:
        loss = torch.stack([(r * w).sum() for r, w in zip(rows, weight, strict=True)]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [g for g in found if g is not None]

    _, states = model.hidden(tokens[:, :6], lengths=torch.tensor(first))
    out, states = model.hidden(tokens[:, 6:10], states, lengths=torch.tensor(second))
    with torch.no_grad():  # there is room for it behind the shorter rows
        model.hidden(tokens[:, :1], states)
    found = of([out[read - 1, i] for i, read in enumerate(second)])
    alone = [
        model.hidden(torch.cat([row[:n], row[6 : 6 + m]])[None])[0][-1, 0]
        for row, n, m in zip(tokens, first, second, strict=True)
    ]
    assert_same(found, of(alone))

"""The whole model, for every mixer: what it starts from, what reaches what, streaming."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from nlscale.model.decoder import Decoder

LEVELS = "levels=[1,4,16]"
PRECISION = [(torch.float32, 3e-6), (torch.float64, 1e-13)]


def loss_of(model: Decoder, tokens: Tensor) -> Tensor:
    """[sequence - 1, batch]"""
    return model(tokens[:, :-1], tokens[:, 1:])


def test_the_initial_loss_is_that_of_knowing_nothing(build, tokens, mixer, cms) -> None:
    model = build(mixer, cms, LEVELS)
    loss = loss_of(model, tokens)
    assert loss.shape == (tokens.shape[1] - 1, tokens.shape[0]) and loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(math.log(61), abs=0.2)


def test_bf16_starts_where_fp32_does(build, tokens, mixer, cms) -> None:
    losses = [
        loss_of(build(mixer, cms, LEVELS, f"train.dtype={dtype}"), tokens).mean().item()
        for dtype in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_with_one_level_both_forms_of_cms_are_the_ordinary_feed_forward(build, tokens) -> None:
    with torch.no_grad():
        one, other = (
            build(f"model.cms={form}", "levels=[1]").double().hidden(tokens)[0]
            for form in ("sequential", "independent")
        )
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_last_loss_feels_the_first_token(build, tokens, mixer, cms) -> None:
    model = build(mixer, cms, LEVELS).double()
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    (gradient,) = torch.autograd.grad(loss_of(model, tokens)[-1].sum(), embedded)
    of_first = gradient[:, 0].norm(dim=-1)  # [batch]
    assert (of_first > 1e-6).all()
    assert torch.isfinite(gradient).all()


def test_every_parameter_learns(build, tokens, mixer, cms) -> None:
    model = build(mixer, cms, LEVELS).double()
    loss_of(model, tokens).sum().backward()
    still = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9
    ]
    assert still == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_logit_depends_on_a_later_token(build, tokens, mixer, cms) -> None:
    model = build(mixer, cms, LEVELS)
    with torch.no_grad():
        before = model.logits(model.hidden(tokens)[0])
        for t in (0, 1, 3, 4, 13, tokens.shape[1] - 1):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 61
            after = model.logits(model.hidden(changed)[0])
            assert torch.equal(after[:t], before[:t])
            assert not torch.equal(after[t:], before[t:])
            assert (after[-1] != before[-1]).any(-1).all()


def test_sequences_of_a_batch_do_not_mix(build, tokens, mixer) -> None:
    model = build(mixer, LEVELS).double()
    with torch.no_grad():
        together = model.hidden(tokens)[0]
        alone = torch.cat([model.hidden(row[None])[0] for row in tokens], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION, ids=["fp32", "fp64"])
def test_a_sequence_in_pieces_is_the_sequence(
    build, tokens, mixer, cms, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(mixer, cms, LEVELS).to(dtype)
    draw = random.Random(f"{mixer}{cms}{dtype}")
    with torch.no_grad():
        whole = model.hidden(tokens)[0]
        for cuts in ([1] * tokens.shape[1], [4] * 6 + [2], random_pieces(draw, tokens.shape[1])):
            pieces, states = [], None
            for piece in tokens.split(cuts, dim=1):
                out, states = model.hidden(piece, states)
                pieces.append(out)
            error = (torch.cat(pieces) - whole).abs().max() / whole.abs().max()
            assert error < tolerance, cuts


def random_pieces(draw: random.Random, length: int) -> list[int]:
    pieces = []
    while sum(pieces) < length:
        pieces.append(draw.randint(1, min(9, length - sum(pieces))))
    return pieces


def test_gradients_in_pieces_are_those_of_the_sequence(build, tokens, mixer) -> None:
    model = build(mixer, LEVELS).double()

    def gradients(cuts: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        out, states = None, None
        for piece in tokens.split(cuts, dim=1):
            out, states = model.hidden(piece, states)
        assert out is not None
        out[-1].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, pieces = gradients([26]), gradients([10, 8, 3, 5])
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        error = (gradient - pieces[name]).abs().max()
        # 1e-14 but for the weight of the read's norm, which is used in fp32
        assert error <= (1e-6 if "read_norm" in name else 1e-12) * gradient.abs().max(), name


def test_the_chunk_is_part_of_the_model(build, tokens) -> None:
    with torch.no_grad():
        coarse, fine = (build(f"model.memory.chunk={chunk}").hidden(tokens)[0] for chunk in (4, 13))
    assert torch.allclose(coarse[:4], fine[:4], atol=1e-6)
    assert not torch.allclose(coarse, fine, atol=1e-6)


def test_hope_without_self_modification_is_the_gated_delta_rule(build, tokens) -> None:
    still = build("model.mixer=hope", "model.memory.lambda_init=0").double()
    static = build("model.mixer=gated-delta").double()
    with torch.no_grad():
        for name, parameter in still.named_parameters():
            if name.endswith("memory_gates"):
                parameter.zero_()
        a, b = (model.hidden(tokens)[0] for model in (still, static))
    assert torch.allclose(a, b, rtol=0, atol=1e-12)

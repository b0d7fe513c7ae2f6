"""Recomputing parts of a block: the same numbers, less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch


def losses_and_gradients(model, tokens) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Losses, gradients, and the bytes of activations kept between forward and backward."""
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(tokens[:, :-1], tokens[:, 1:])
    held = sum(kept.values())
    losses.sum().backward()
    return losses.detach(), [p.grad for p in model.parameters()], held


@pytest.mark.parametrize("parts", ["mixer", "cms", "mixer,cms"])
def test_recomputed_parts_change_memory_and_nothing_else(build, mixer, cms, parts, tokens) -> None:
    keys = [mixer, cms, "levels=[1,4]"]
    plain = losses_and_gradients(build(*keys), tokens)
    recomputed = losses_and_gradients(build(*keys, f"train.recompute=[{parts}]"), tokens)
    assert torch.equal(plain[0], recomputed[0])
    for expected, gradient in zip(plain[1], recomputed[1], strict=True):
        assert torch.equal(expected, gradient)
    assert recomputed[2] < 0.95 * plain[2]


def test_recomputed_pieces_of_a_sequence_change_nothing(build, mixer, tokens) -> None:
    def gradients(parts: str) -> list[torch.Tensor]:
        model, states, pieces = build(mixer, f"train.recompute=[{parts}]"), None, []
        for piece in tokens.split([10, 8, 3, 5], dim=1):
            out, states = model.hidden(piece, states)
            pieces.append(out)
        model.logits(torch.cat(pieces)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    for expected, gradient in zip(gradients(""), gradients("mixer"), strict=True):
        assert torch.equal(expected, gradient)

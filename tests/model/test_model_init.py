"""Initial weights are a function of the seed and the parameter's name alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nlscale.model.init import constant, initialize, join, normal, orthogonal, split, spread, tag

LEVELS = "levels=[1,4]"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_random(weight: torch.Tensor) -> bool:
    return weight.unique().numel() > weight.numel() // 2 and weight.dim() > 1


def test_the_same_seed_gives_the_same_model(build, mixer, cms) -> None:
    torch.manual_seed(1)
    first = weights(build(mixer, cms, LEVELS))
    torch.manual_seed(2)
    second = weights(build(mixer, cms, LEVELS))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_model(build, mixer) -> None:
    first, second = (weights(build(mixer, LEVELS, seed=seed)) for seed in (1, 2))
    random = [name for name in first if is_random(first[name])]
    assert len(random) > 8
    assert not any(torch.equal(first[name], second[name]) for name in random)


def test_no_two_parameters_share_their_weights(build, mixer) -> None:
    drawn = [w for w in weights(build(mixer, LEVELS)).values() if is_random(w)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert one.shape != other.shape or not torch.equal(one, other)


def test_weights_do_not_depend_on_the_rest_of_the_model(build) -> None:
    small, large = (weights(build(f"model.layers={n}")) for n in (1, 2))
    shared = [name for name in small if not name.endswith(("output.weight", "down.weight"))]
    assert all(torch.equal(small[name], large[name]) for name in shared)


def test_the_scales_are_those_of_the_configuration(build, mixer) -> None:
    model = weights(build(mixer, "model.init_std=0.05", "model.d_model=64", "model.hidden=96"))
    residual = 0.05 / (2 * 2) ** 0.5
    for name, std in {
        "embedding.weight": 0.05,
        "head.weight": 0.05,
        "blocks.0.mixer.project.weight": 0.05,
        "blocks.0.mixer.output.weight": residual,
        "blocks.1.cms.mlps.0.up.weight": 0.05,
        "blocks.1.cms.mlps.0.down.weight": residual,
    }.items():
        assert model[name].std().item() == pytest.approx(std, rel=0.06), name
    assert all((w == 1).all() for name, w in model.items() if "norm" in name)


def test_the_memory_starts_as_configured(build) -> None:
    model = weights(build("model.memory.lambda_init=0.4", "model.memory.eta_bias=-1"))
    eye = torch.eye(16)
    for name in ("memory_key", "memory_value"):
        for head in model[f"blocks.0.mixer.{name}"]:
            assert torch.allclose(head @ head.T, eye, atol=1e-5)
    assert torch.allclose(model["blocks.0.mixer.lambda_key"], torch.tensor(0.4))
    assert torch.allclose(model["blocks.0.mixer.eta_bias"], torch.tensor(-1.0))
    assert torch.allclose(model["blocks.0.mixer.alpha_bias"], torch.tensor([3.0, 5.0]))


class Toy(nn.Module):
    """A parameter of each kind of split, as one of `size` tensor-parallel ranks holds it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(12 // size, 5))
        self.columns = nn.Parameter(torch.empty(5, 12 // size))
        self.stacked = nn.Parameter(torch.empty(3 * 8 // size, 5))
        self.heads = nn.Parameter(torch.empty(4 // size, 3, 3))
        self.bias = nn.Parameter(torch.empty(8 // size))
        self.whole = nn.Parameter(torch.empty(7))
        self.scale = nn.Parameter(torch.empty(2))
        tag(self.rows, normal(1.0), 0)
        tag(self.columns, normal(1.0), 1)
        tag(self.stacked, normal(1.0), 0, sections=[8, 12, 4])
        tag(self.heads, orthogonal, 0)
        tag(self.bias, spread(4.0, 1.0), 0)
        tag(self.whole, normal(1.0))
        tag(self.scale, constant(2.0))


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_the_ranks_make_the_whole(size: int) -> None:
    full, parts = Toy(1), [Toy(size) for _ in range(size)]
    initialize(full, 5, 0, 1)
    for rank, part in enumerate(parts):
        initialize(part, 5, rank, size)
    for name, dim in (("rows", 0), ("columns", 1), ("heads", 0), ("bias", 0)):
        joined = torch.cat([getattr(part, name) for part in parts], dim)
        assert torch.equal(joined, getattr(full, name)), name
    sizes = [8, 12, 4]
    local = [part.stacked.split([s // size for s in sizes]) for part in parts]
    for section, whole in enumerate(full.stacked.split(sizes)):  # each is split by itself
        assert torch.equal(torch.cat([sections[section] for sections in local]), whole)
    for name, parameter in full.named_parameters():
        pieces = split(parameter.detach(), getattr(parts[0], name), size)
        assert all(
            torch.equal(piece, getattr(part, name))
            for piece, part in zip(pieces, parts, strict=True)
        )
        assert torch.equal(join(pieces, getattr(parts[0], name)), parameter)
    for part in parts:
        assert torch.equal(part.whole, full.whole) and torch.equal(part.scale, full.scale)


def test_initialising_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    initialize(Toy(1), 5, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)

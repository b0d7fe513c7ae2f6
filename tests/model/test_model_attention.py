"""The keys of a Transformer: shared keys and values, normalised heads, tied embeddings, z-loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import world
from levels import level_runs
from torch import Tensor, nn

from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.model.flops import flops_by_part
from nlscale.model.mixers.table import mixer
from nlscale.model.sizes import level_parameters, non_embedding_parameters
from nlscale.ops.attention import causal_attention
from nlscale.ops.documents import Documents
from nlscale.plan.checks import check_sizes
from nlscale.plan.memory import held_by_stage

ATTENTION = "model.mixer=attention"
GROUPED = [ATTENTION, "model.heads=4", "model.attention.kv_heads=2", "model.attention.head_dim=16"]
NORMED = [ATTENTION, "model.attention.qk_norm=true"]
TIED = [ATTENTION, "model.tie_embeddings=true"]
ALL = [*GROUPED, NORMED[1], TIED[1], "train.z_loss=0.1"]
KEYS = {"grouped": GROUPED, "normed": NORMED, "tied": TIED, "all": ALL}


def by_torch(model: nn.Module, heads: int, shared: int, x: Tensor) -> Tensor:
    """What the first block's attention makes of x [sequence, batch, d], by torch's functions."""
    own: Any = model.blocks["0"].mixer  # type: ignore[index]
    size = own.head_dim
    q, k, v = (
        part.unflatten(-1, (-1, size)).permute(1, 2, 0, 3)
        for part in (x @ own.project.weight.T).split(
            [heads * size, shared * size, shared * size], -1
        )
    )
    if own.query_norm is not None:
        q = F.rms_norm(q, (size,), own.query_norm.weight, own.query_norm.eps)
        k = F.rms_norm(k, (size,), own.key_norm.weight, own.key_norm.eps)
    half = torch.arange(size // 2, dtype=torch.float64) / (size // 2)
    turned = torch.exp(1j * torch.arange(len(x))[:, None] * 10000.0**-half)
    q, k = (
        torch.view_as_real(torch.complex(*y.chunk(2, -1)) * turned).transpose(-1, -2).flatten(-2)
        for y in (q, k)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2) @ own.output.weight.T


@pytest.mark.parametrize("length", [26, 150], ids=["short", "by blocks"])
@pytest.mark.parametrize("keys", [GROUPED, NORMED, [*GROUPED, NORMED[1]]], ids=str)
def test_grouped_and_normalised_heads_are_those_of_torch(build, keys, length: int) -> None:
    model = build(*keys).double()
    own: Any = model.blocks["0"].mixer
    generator = torch.Generator().manual_seed(1)
    for name, p in own.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    x = torch.randn(length, 2, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [x, *own.parameters()]
    heads, shared = (4, 2) if keys[1] == GROUPED[1] else (2, 2)
    found, want = own(x)[0], by_torch(model, heads, shared, x)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        [found, *torch.autograd.grad(found, leaves, weight)],
        [want, *torch.autograd.grad(want, leaves, weight)],
        strict=True,
    ):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_shared_keys_are_read_whatever_came_before_and_within_documents() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, heads, 12, 8, generator=generator, dtype=torch.float64)
        for heads in (6, 2, 2)
    )
    repeated = [x.repeat_interleave(3, 1) for x in (k, v)]
    tokens = torch.ones(2, 12, dtype=torch.int64)
    tokens[0, 4] = tokens[1, 7] = 0
    documents = Documents.of(tokens.numpy(), 0, 4, q.device)
    past = torch.tensor([11, 5])
    for last, *more in (
        (1, None, True, 11),
        (1, None, True, past),
        (5, None, True, 7),
        (12, documents),
    ):
        some = q[:, :, 12 - last :]
        found, want = causal_attention(some, k, v, *more), causal_attention(some, *repeated, *more)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_every_parameter_learns_and_is_counted(build, tokens, keys) -> None:
    model = build(*keys, "levels=[1,4]")
    config = recipe.load(
        None, ["data.dir=none", "model.d_model=32", "model.heads=2", *TINY, *keys]
    ).config
    count = level_parameters(config, 61)
    by_level = [0, 0]
    model.double()(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-9, name
        by_level[model.level_and_depth(name)[0]] += p.numel()
    assert by_level == count
    embeddings = [n for n, p in model.named_parameters() if tuple(p.shape) == (61, 32)]
    assert len(embeddings) == (1 if config.model.tie_embeddings else 2)
    looked_up = 0 if config.model.tie_embeddings else 61 * 32
    assert non_embedding_parameters(config, 61) == sum(count) - looked_up
    assert flops_by_part(config, 61)["head"] == 6 * 61 * 32
    whole = sum(p.numel() for p in model.parameters() if not p.tensor_model_parallel)
    assert sum(w for _, w in held_by_stage(config, 61, [range(2)])) == whole
    facts = mixer("attention")
    module = model.blocks["0"].mixer
    expected = facts.parameters(config.model) - 32
    assert sum(p.numel() for p in module.parameters()) == expected


TINY = ["model.layers=2", "model.hidden=48", "levels=[1,4]"]


def test_the_gradient_of_one_matrix_for_both_ends_is_the_sum(build, tokens) -> None:
    tied, untied = build(*TIED).double(), build(ATTENTION).double()
    untied.load_state_dict(
        {**tied.state_dict(), "head.weight": tied.embedding.weight}, strict=False
    )
    gradients = []
    for model in (tied, untied):
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    one, two = gradients
    torch.testing.assert_close(
        one.pop("embedding.weight"), two.pop("embedding.weight") + two.pop("head.weight")
    )
    assert all(torch.allclose(one[name], two[name]) for name in one | two)


@pytest.mark.parametrize("kernels", ["true", "false"])
def test_z_loss_is_differentiated_and_not_reported(build, tokens, kernels: str) -> None:
    with_z, without = (
        build(ATTENTION, f"train.kernels={kernels}", f"train.z_loss={z}").double() for z in (0.1, 0)
    )
    given, targets = tokens[:, :-1], tokens[:, 1:]
    losses = with_z(given, targets)
    assert torch.equal(losses, without(given, targets))
    weight = torch.rand(losses.shape, dtype=torch.float64)
    names, leaves = zip(*with_z.named_parameters(), strict=True)
    found = torch.autograd.grad((losses * weight).sum(), leaves)
    logits = without.logits(without.hidden(given)[0])
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.T.flatten(), reduction="none")
    z = logits.logsumexp(-1)
    total = (weight * (entropy.view(weight.shape) + 0.1 * z**2)).sum()
    for name, a, b in zip(
        names, found, torch.autograd.grad(total, list(without.parameters())), strict=True
    ):
        assert (a - b).norm() < 1e-12 * b.norm(), name


RUN = ["train.steps=3", "levels=[1,2]", "model.hidden=48", "model.layers=2"]


@pytest.mark.parametrize("sequence", ["false", "true"])
def test_tensor_parallel_ranks_train_as_one(sequence: str) -> None:
    split = ["parallel.tensor=2", f"parallel.sequence={sequence}", "data.sequence_length=16"]
    overrides = [*RUN, *ALL, "data.sequence_length=16"]
    (alone,) = world.run(1, level_runs.run_oracle, overrides)
    found, _ = world.run(2, level_runs.run_engine, [*overrides, *split])
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert level_runs.largest_difference(found["parameters"], alone["parameters"]) < 2e-5
    assert "head.weight" not in found["parameters"]
    assert found["parameters"]["blocks.0.mixer.query_norm.weight"].shape == (16,)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.attention.kv_heads=1"],
            "model.attention.kv_heads is 1, which hope does not read",
        ),
        (["model.attention.qk_norm=true"], "model.attention.qk_norm is True, which hope"),
        (
            [*GROUPED, "model.attention.kv_heads=3"],
            "model.heads 4 do not share .*kv_heads 3 evenly",
        ),
        (
            [*GROUPED, "parallel.tensor=4"],
            "model.attention.kv_heads 2 is not divisible by parallel.t",
        ),
        (
            [*GROUPED, "model.attention.head_dim=15"],
            "head_dim is 15; rotary positions need it even",
        ),
        ([*TIED, "parallel.pipeline=2"], "model.tie_embeddings .*; use parallel.pipeline=1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(overrides: list[str], said: str) -> None:
    config = recipe.load(None, ["data.dir=none", *overrides]).config
    with pytest.raises(UserError, match=said):
        check_sizes(config, config.parallel.tensor * config.parallel.pipeline)


def test_a_head_size_of_its_own_needs_no_width_that_divides() -> None:
    keys = [
        "data.dir=none",
        ATTENTION,
        "model.d_model=40",
        "model.heads=3",
        "model.attention.head_dim=8",
    ]
    config = recipe.load(None, keys).config
    assert check_sizes(config, 1) == 1
    assert mixer("attention").parameters(config.model) == 40 + 4 * 40 * 24

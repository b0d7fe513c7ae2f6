"""MLPs that change inside the context against a plain loop, and what must hold of any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import world
from model.conftest import VOCABULARY, Build, tiny
from torch import Tensor

from nlscale.model.sizes import level_parameters
from nlscale.ops.documents import Documents

KEYS = "{chunk: 5, learning_rate: 3.0, decay: 0.8, blocks: 1}"
LOCAL = [f"levels=[{{context: {KEYS}}},{{period: 4}}]", "data.sequence_length=26"]
BOTH = [
    "levels=[{context: {chunk: 5, blocks: 2, learning_rate: 3.0}},"
    "{period: 4, context: {chunk: 3, blocks: 2, learning_rate: 3.0}}]",
    "data.sequence_length=26",
]
SEPARATOR = VOCABULARY - 1


def double(model: Any) -> Any:
    """In float64, with targets so large that the changes count."""
    model = model.double()
    for name, parameter in model.named_parameters():
        if ".target." in name:
            parameter.data *= 20
    return model


def by_token(cms: Any, x: Tensor, ends: list[int], rate: float, chunk: int, decay: float) -> Tensor:
    """What a CMS whose first MLP changes adds, to one row [time, d_model], token by token.

    `ends` are of the documents."""

    def norm(i: int, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], cms.norms[i].weight, cms.norms[i].eps)

    def hidden(mlp: Any, x: Tensor) -> Tensor:
        gate, up = (mlp.up.weight @ x).chunk(2)
        return F.silu(gate) * up

    changing, total = cms.contexts["0"], []
    window = changing.convolution
    for first, last in zip([0, *ends], ends, strict=False):
        change, opened, seen = 0.0, 0.0, []
        for t in range(last - first):
            if t and t % chunk == 0:
                change, opened = decay * change + opened / chunk, 0.0
            token = x[first + t]
            normed = norm(0, token)
            seen.append(normed)
            mixed = sum(s * w for s, w in zip(reversed(seen), reversed(window), strict=False))
            h, v = hidden(cms.mlps[0], normed), changing.target.weight @ mixed
            y = cms.mlps[0].down.weight @ h
            if t >= chunk:
                y = y + rate * change @ h
            opened = opened + torch.outer(v, h)
            if cms.mixture is None:
                again = token + y
                y = y + cms.mlps[1].down.weight @ hidden(cms.mlps[1], norm(1, again))
            else:
                share = torch.softmax(cms.mixture, 0)
                other = cms.mlps[1].down.weight @ hidden(cms.mlps[1], normed)
                y = share[0] * y + share[1] * other
            total.append(y)
    return torch.stack(total)


@pytest.mark.parametrize("recompute", ["[]", "[mixer,cms]"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_a_cms_is_the_loop_in_values_and_gradients(
    build: Build, cms: str, packed: bool, recompute: str
) -> None:
    model = double(build(*LOCAL, cms, f"train.recompute={recompute}"))
    block: Any = model.blocks["1"].cms
    tokens = torch.zeros(2, 22, dtype=torch.long)
    documents, ends = None, [[22], [22]]
    if packed:
        tokens[0, 7], tokens[0, 8], tokens[1, 16] = SEPARATOR, SEPARATOR, SEPARATOR
        documents = Documents.of(tokens.numpy(), SEPARATOR, 4, torch.device("cpu"), others=[5])
        ends = [[7, 8, 22], [16, 22]]
    x = torch.randn(22, 2, 32).double().requires_grad_()
    before, update, _ = block(x, torch.zeros_like(x), None, documents)
    got = before - x + update
    rows = [by_token(block, x[:, i], ends[i], 3.0, 5, 0.8) for i in range(2)]
    want = torch.stack(rows, 1)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(want)
    leaves = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))
        assert float(other.abs().max()) > 1e-6


def test_at_learning_rate_0_it_is_the_static_model_to_the_bit(build: Build, cms: str) -> None:
    levels = [x.replace("learning_rate: 3.0", "learning_rate: 0") for x in BOTH]
    tokens = torch.randint(VOCABULARY, (2, 27))
    found = []
    for model in (build(*levels, cms), build("levels=[1,4]", cms)):
        losses = model(tokens[:, :-1], tokens[:, 1:])
        losses.sum().backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (static, of_static) = found
    assert torch.equal(losses, static)
    for name, gradient in of_static.items():
        assert torch.equal(gradients.pop(name), gradient), name
    assert gradients and not any(g.any() for g in gradients.values())


def test_later_tokens_and_other_rows_change_nothing(build: Build, cms: str) -> None:
    model = double(build(*BOTH, cms))
    tokens = torch.randint(VOCABULARY, (3, 27))
    losses = model(tokens[:, :-1], tokens[:, 1:]).T
    for row in range(3):
        own = tokens[row : row + 1]
        assert torch.allclose(model(own[:, :-1], own[:, 1:]).T[0], losses[row], atol=1e-11)
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % VOCABULARY
    again = model(other[:, :-1], other[:, 1:]).T
    assert torch.allclose(again[:, :11], losses[:, :11], atol=1e-11)
    assert float((again[:, 12:] - losses[:, 12:]).abs().max()) > 1e-3
    # and the changes count: without them the first chunk alone is the same
    static = double(build("levels=[1,4]", cms))
    apart = (static(tokens[:, :-1], tokens[:, 1:]).T - losses).abs()
    assert float(apart[:, :3].max()) < 1e-11 and float(apart[:, 15:].max()) > 1e-3


def test_each_part_has_a_gradient_and_is_counted(build: Build, cms: str) -> None:
    model, config = build(*BOTH, cms), tiny(*BOTH, cms)
    tokens = torch.randint(VOCABULARY, (2, 27))
    model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        counts[model.level_and_depth(name)[0]] += parameter.numel()
    assert counts == level_parameters(config, VOCABULARY)


def losses_on(layouts: list[list[str]]) -> list[tuple[list[float], dict[str, float]]]:
    """Of each layout the losses, and of each gradient a number, over the whole model."""
    import torch.distributed as dist
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    from nlscale.model.decoder import Decoder
    from nlscale.model.init import initialize
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    found = []
    for overrides in layouts:
        config = tiny(*overrides)
        with process_groups(config) as layout:
            model = Decoder(config, megatron_config(config), VOCABULARY + 1)
            initialize(model, 1, layout.tensor_rank, layout.tensor_size)
            generator = torch.Generator().manual_seed(3)
            tokens = torch.randint(VOCABULARY, (2, 25), generator=generator)
            losses = model(tokens[:, :-1], tokens[:, 1:])
            losses.sum().backward()
            sums = {}
            for name, parameter in model.named_parameters():
                p: Any = parameter
                gradient = p.grad.double()
                if p.partial_gradient:
                    dist.all_reduce(gradient, group=get_tensor_model_parallel_group())
                square = gradient.square().sum()
                if p.tensor_model_parallel:
                    dist.all_reduce(square, group=get_tensor_model_parallel_group())
                sums[name] = float(square) ** 0.5
            found.append((losses.flatten().tolist(), sums))
    return found


def test_two_tensor_parallel_ranks_are_one() -> None:
    more = ["data.sequence_length=24", *(x for x in BOTH if "levels" in x)]
    shapes = [[*more, f"model.cms={form}"] for form in ("sequential", "independent")]
    one = world.run(1, losses_on, shapes)[0]
    split = [
        [*shape, "parallel.tensor=2", f"parallel.sequence={flag}"]
        for shape in shapes
        for flag in ("false", "true")
    ]
    two = world.run(2, losses_on, split)[0]
    for index, (losses, sums) in enumerate(two):
        of, squares = one[index // 2]
        assert losses == pytest.approx(of, rel=2e-5)
        assert sums == pytest.approx(squares, rel=2e-4, abs=1e-6)

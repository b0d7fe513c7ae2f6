"""Memories that are off by default, as whole models: counted, planned, in pieces and on ranks."""

from __future__ import annotations

import pytest
import torch
import world
from golden.make import losses
from model.conftest import VOCABULARY, tiny
from model.test_model_flops import make

from nlscale.errors import UserError
from nlscale.model.flops import flops_by_part
from nlscale.model.init import split
from nlscale.model.mixers.facts import MicroBatch
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.table import mixer as mixer_of
from nlscale.ops.documents import Documents
from nlscale.plan.checks import check_sizes
from nlscale.plan.programs import advise

STATIC = (
    "model.memory={query_convolution: true, write: decayed, strength: 2, gate_activation: sigmoid}"
)
SERIAL = "model.memory={gain: kalman, reads_state: true, chunk_momentum: true, write: decayed}"
CHANNEL = "model.memory={gates: channel, reads_state: true, write: decayed}"
BOTH = pytest.mark.parametrize(
    "memory", [STATIC, SERIAL, CHANNEL], ids=["static", "serial", "channel"]
)
WEIGHTS = ("state_weight", "momentum_weight")


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """With the weights that begin at 0 at something else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(WEIGHTS):
                parameter.fill_(0.3)
    return model


def facts_of(*overrides: str) -> MemoryFacts:
    facts = mixer_of(tiny(*overrides).model.mixer)
    assert isinstance(facts, MemoryFacts)
    return facts


@pytest.mark.parametrize("name", ["hope", "gated-delta"])
@BOTH
def test_what_is_counted_is_there(build, name: str, memory: str) -> None:
    choice = [f"model.mixer={name}", memory]
    block, config = build(*choice).blocks["0"], tiny(*choice)
    count = sum(p.numel() for part in (block.norm, block.mixer) for p in part.parameters())
    facts = facts_of(*choice)
    assert facts.parameters(config.model) == count
    shapes: dict[tuple[int, ...], int] = {}
    for parameter in block.mixer.parameters():
        if parameter.matrix:
            rows, columns = parameter.shape[-2:]
            for size in parameter.sections or (rows,):
                many = len(parameter) if parameter.dim() == 3 else 1
                shapes[size, columns] = shapes.get((size, columns), 0) + many
    assert facts.matrices(config.model) == shapes


@BOTH
def test_every_parameter_learns_once_it_is_awake(build, tokens, memory: str) -> None:
    """And as much where the mixer is computed again in the backward pass."""
    found = []
    for recompute in ("[]", "[mixer]"):
        again = f"train.recompute={recompute}"
        model = awake(build("model.mixer=hope", memory, again).double())
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and bool(gradient.abs().max() > 0), name
        assert torch.allclose(gradient, found[1][name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("name", ["hope", "gated-delta"])
@BOTH
def test_pieces_tokens_and_the_whole_are_the_same(build, tokens, name: str, memory: str) -> None:
    from nlscale.model.one_token import DecoderOneToken

    model = awake(build(f"model.mixer={name}", memory).double())
    with torch.no_grad():
        whole = model.hidden(tokens)[0]
        pieces, states = [], None
        for piece in tokens.split([3, 9, 1, 1, 6, 6], dim=1):
            out, states = model.hidden(piece, states)
            pieces.append(out)
        assert torch.allclose(torch.cat(pieces), whole, rtol=0, atol=1e-12)
        _, states = model.hidden(tokens[:, :5])
        step = DecoderOneToken(model)
        for t in range(5, 14):
            logits = step.logits(tokens[:, t], states, None)
            step.advance(states, None)
        want = torch.nn.functional.linear(model.norm(whole)[13], model.head.weight)
        assert torch.allclose(logits, want, rtol=0, atol=1e-12)


@BOTH
def test_documents_of_a_row_are_each_alone(build, memory: str) -> None:
    tokens = torch.randint(VOCABULARY - 1, (1, 25), generator=torch.Generator().manual_seed(3))
    tokens[0, [9, 14]] = VOCABULARY - 1
    model = awake(build("model.mixer=gated-delta", memory).double())
    where = Documents.of(tokens[:, :-1].numpy(), VOCABULARY - 1, 4, torch.device("cpu"))
    with torch.no_grad():
        together = model(tokens[:, :-1], tokens[:, 1:], where)
        alone = [
            model(tokens[:, a:b], tokens[:, a + 1 : b + 1]) for a, b in ((0, 9), (9, 14), (14, 24))
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-10)


def test_two_tensor_parallel_ranks_learn_what_one_does() -> None:
    options = [STATIC, SERIAL, "model.layers=1"]
    (one,) = world.run(1, losses, "gated-delta", options)
    split = ["parallel.tensor=2", "parallel.sequence=true"]
    for curve in world.run(2, losses, "gated-delta", [*options, *split]):
        assert curve == pytest.approx(one, abs=1e-4)
    assert one[-1] < one[0] - 0.5


def gradients(options: list[str]) -> dict[str, torch.Tensor]:
    """Of this rank's part of the last block, in float64."""
    from nlscale.model.decoder import Decoder
    from nlscale.model.init import initialize
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    config = tiny(*options)
    with process_groups(config) as layout:
        model = Decoder(config, megatron_config(config), 62)
        initialize(model, 5, layout.tensor_rank, layout.tensor_size)
        awake(model.double())
        tokens = torch.randint(62, (2, 13), generator=torch.Generator().manual_seed(3))
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        return {name: parameter.grad for name, parameter in model.blocks["1"].named_parameters()}


def test_two_ranks_share_gates_of_channels(build) -> None:
    options = ["model.mixer=hope", CHANNEL, "model.layers=2"]
    (alone,) = world.run(1, gradients, options)
    split_by = ["parallel.tensor=2", "parallel.sequence=true"]
    ranks = world.run(2, gradients, [*options, *split_by])
    mixer = dict(build(*options).blocks["1"].named_parameters())
    for name, whole in alone.items():
        if name.startswith("mixer."):
            for rank, part in enumerate(split(whole, mixer[name], 2)):
                found = ranks[rank][name]
                assert torch.allclose(found, part, rtol=1e-9, atol=1e-11), name


def test_what_two_ranks_cannot_share_is_refused() -> None:
    sizes = [CHANNEL, "model.mixer=gated-delta", "model.d_model=60", "model.heads=4"]
    with pytest.raises(UserError, match=r"head's size 15 is not divisible by parallel.tensor 2"):
        check_sizes(tiny(*sizes, "model.hidden=48", "parallel.tensor=2"), 2)
    check_sizes(tiny(*sizes, "model.hidden=48"), 1)


def test_gates_of_channels_cost_their_products(build) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    options = ["model.mixer=gated-delta", CHANNEL, "model.layers=1"]
    mixer, x = build(*options).blocks["0"].mixer, torch.randn(7, 2, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projected, _ = mixer.project(x)
        mixer.channel_gates.logits(projected[..., -16:])
        mixer.output(x)
    planned = flops_by_part(tiny(*options), VOCABULARY)["projections"]
    assert planned == pytest.approx(3 * counter.get_total_flops() / 14, rel=1e-9)


def test_reading_the_state_costs_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from nlscale.ops.check import ScanInputs
    from nlscale.ops.memory.scan import memory_scan

    counts = []
    for memory in ("gain=kalman", "reads_state=true"):
        config = make("model.mixer=gated-delta", f"model.memory.{memory}")
        facts = mixer_of("gated-delta")
        assert isinstance(facts, MemoryFacts)
        inputs = ScanInputs(
            facts.rules(config.model), (1, 2, 96, 32), False, 0.0, (0.0, 4.0), torch.float32,
            torch.device("cpu"),
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            memory_scan(*inputs.arguments(), main=inputs.main())
        planned = flops_by_part(config, VOCABULARY)["memory"]
        counts.append((counter.get_total_flops() / 96, planned))
    (without, planned_without), (with_it, planned_with) = counts
    layers, passes = 2, 3
    costs = layers * passes * (with_it - without)
    assert planned_with - planned_without == pytest.approx(costs, rel=1e-9)


def test_what_no_kernel_takes_is_said_by_the_plan_and_what_cannot_be_is_refused() -> None:
    def said(*memory: str) -> list[str]:
        config = make("train.dtype=bf16", "model.d_model=128", *memory)
        return [x for x in advise(config, 64, 1, lambda _: True) if "no kernel" in x]

    assert said() == said("model.memory.query_convolution=true") == []
    (line,) = said(SERIAL, "model.mixer=gated-delta")
    assert "model.memory.gain, reads_state, chunk_momentum" in line and "torch" in line
    assert said("model.memory.write=decayed", "model.memory.strength=2") == []
    assert "model.mixer=retnet" in said("model.mixer=retnet")[0]
    assert said(SERIAL, "train.kernels=false") == []
    batch = MicroBatch(make("train.dtype=bf16", SERIAL))
    assert mixer_of("hope").serial_programs(batch) is None
    batch = MicroBatch(make("train.dtype=bf16", "model.memory.write=decayed"))
    assert mixer_of("hope").serial_programs(batch)
    for options, words in (
        (["model.memory.strength=2"], "set model.memory.write=decayed"),
        (["model.memory.gates=channel"], "set model.memory.write=decayed"),
        ([CHANNEL, "model.memory.gain=kalman"], "leave one of the two out"),
        ([CHANNEL, "model.mixer=deltanet"], "gates, reads_state: .* use hope or gated-delta"),
        (["model.mixer=hope-pure", "model.memory.reads_state=true"], "use hope or gated-delta"),
    ):
        model = tiny(*options).model
        with pytest.raises(UserError, match=words):
            mixer_of(model.mixer).check(model)

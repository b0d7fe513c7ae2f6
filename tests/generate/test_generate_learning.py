"""Levels that learn from what they read, against a loop with autograd.grad of one sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generate.models import random_tokens, saved
from torch import Tensor

import nlscale
from nlscale.errors import UserError
from nlscale.generate.learning import LearningStream
from nlscale.generate.model import Model
from nlscale.parallel.alone import alone

KEYS = [
    "level0.chunk=6", "level0.learning_rate=0.5", "level0.clip=0.4", "level0.blocks=2",
    "level1.chunk=12", "level1.learning_rate=0.3", "level1.pull=0.2", "level1.blocks=1",
]  # fmt: skip
LEVELS = {0: (1, 0.5, 0.4, 0.0, ("0", "1")), 1: (2, 0.3, None, 0.2, ("1",))}
"""Of each MLP: its period in chunks of 6, learning rate, clip, pull and blocks."""
EXACT = 1e-10


@pytest.fixture(scope="module", params=["hope", "attention", "independent"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    form = {"independent": "model.cms=independent"}.get(
        request.param, f"model.mixer={request.param}"
    )
    saved(run, form)
    return nlscale.load(run, device="cpu", dtype=torch.float64)


def by_loop(model: Model, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of one sequence, and the weights that it ends with; the model stays as it was."""
    decoder: Any = model._decoder
    before = {name: w.detach().clone() for name, w in decoder.named_parameters()}
    weights = {
        mlp: [
            parameter
            for block in of[-1]
            for parameter in (
                decoder.blocks[block].cms.mlps[mlp].up.weight,
                decoder.blocks[block].cms.mlps[mlp].down.weight,
            )
        ]
        for mlp, of in LEVELS.items()
    }
    trained = {mlp: [w.detach().clone() for w in of] for mlp, of in weights.items()}
    window = {mlp: [torch.zeros_like(w) for w in of] for mlp, of in weights.items()}
    targets, found, states = {0: 0, 1: 0}, [], None
    for number, first in enumerate(range(0, len(tokens) - 1, 6), 1):
        inputs, wanted = tokens[first : first + 6], tokens[first + 1 : first + 7]
        with alone():
            inputs = inputs[: len(wanted)]
            x, states = decoder.hidden(inputs[None], states)
            losses = F.cross_entropy(decoder.logits(x)[:, 0], wanted, reduction="none")
        found.append(losses.detach())
        if len(wanted) < 6:
            break
        with alone():
            flat = [w for of in weights.values() for w in of]
            gradients = iter(torch.autograd.grad(losses.sum(), flat))
        states = {k: state.select(torch.arange(1)) for k, state in states.items()}
        for state in states.values():
            for key, x in state.tensors().items():
                setattr(state, key, x.detach())
        for mlp, (period, rate, clip, pull, _) in LEVELS.items():
            for total in window[mlp]:
                total += next(gradients)
            targets[mlp] += 6
            if number % period:
                continue
            mean = [total / targets[mlp] for total in window[mlp]]
            norm = torch.cat([g.flatten() for g in mean]).norm()
            scale = 1.0 if clip is None else min(1.0, clip / float(norm))
            with torch.no_grad():
                for w, g, w0, total in zip(
                    weights[mlp], mean, trained[mlp], window[mlp], strict=True
                ):
                    w -= rate * (scale * g + pull * (w - w0))
                    total.zero_()
            targets[mlp] = 0
    after = {name: w.detach().clone() for name, w in decoder.named_parameters()}
    decoder.load_state_dict(before)
    return torch.cat(found), after


def test_it_is_the_loop_for_each_sequence_in_any_pieces(model: Model) -> None:
    torch.manual_seed(2)
    tokens = random_tokens(2, 40)
    stream = model.learning(batch=2, context=KEYS)
    losses = stream.feed(tokens)
    assert losses.shape == (2, 40) and bool(losses[:, 0].isnan().all())
    for row in range(2):
        wanted, weights = by_loop(model, tokens[row])
        assert torch.allclose(losses[row, 1:], wanted, rtol=EXACT, atol=EXACT)
        for name, change in stream.changes().items():
            before = dict(model._decoder.named_parameters())[name]
            assert torch.allclose(before + change[row], weights[name], atol=EXACT), name
            assert float(change[row].detach().abs().max()) > 1e-4
    cut = model.learning(batch=2, context=KEYS)
    pieces = [cut.feed(piece) for piece in tokens.split([1, 3, 2, 1, 17, 6, 10], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1)[:, 1:], losses[:, 1:], rtol=EXACT, atol=EXACT)
    static = F.cross_entropy(model.logits(tokens)[0, :-1], tokens[0, 1:], reduction="none")
    apart = (static - losses[0, 1:]).abs()
    assert float(apart[:6].max()) < EXACT and float(apart[6:].max()) > 1e-3


def test_a_loss_does_not_know_of_later_tokens_and_at_rate_0_of_nothing(model: Model) -> None:
    torch.manual_seed(3)
    tokens = random_tokens(1, 30)
    other = tokens.clone()
    other[:, 14:] = (other[:, 14:] + 1) % 60
    first, second = (model.learning(context=KEYS).feed(x)[:, 1:14] for x in (tokens, other))
    assert torch.equal(first[:, :13], second[:, :13])
    still = model.learning(context=["level0.chunk=6", "level0.learning_rate=0"])
    losses, stream, static = still.feed(tokens), model.stream(), []
    for piece in tokens[:, :-1].split(6, dim=1):  # as it reads, to the bit
        static.append(stream.feed(piece))
    wanted = F.cross_entropy(torch.cat(static, 1)[0], tokens[0, 1:], reduction="none")
    assert torch.equal(losses[0, 1:], wanted)
    assert not any(change.any() for change in still.changes().values())


def test_new_sequences_begin_from_the_trained_weights_or_never(model: Model) -> None:
    torch.manual_seed(4)
    tokens = random_tokens(1, 20)
    forgets = model.learning(context=KEYS)
    before = forgets.feed(tokens)
    forgets.begin()
    assert torch.equal(forgets.feed(tokens)[:, 1:], before[:, 1:]) and forgets.length == 20
    keys = [*KEYS, "level0.reset=never"]
    goes_on = model.learning(context=keys)
    goes_on.feed(tokens)
    goes_on.begin()
    again = goes_on.feed(tokens)
    assert float((again - before)[:, 1:].abs().max()) > 1e-3
    assert float(again[:, 1:].mean()) < float(before[:, 1:].mean())  # it has read it before


def test_it_goes_on_from_its_tensors_to_the_bit(model: Model) -> None:
    torch.manual_seed(5)
    tokens = random_tokens(2, 34)
    keys = [*KEYS, "level1.reset=never"]

    def rest(stream: LearningStream) -> Tensor:
        found = stream.feed(tokens[:, stream.length : 27])
        stream.begin()
        return torch.cat([found, stream.feed(tokens[:, 27:])[:, 1:]], 1)

    for cut in (3, 16):
        one = model.learning(batch=2, context=keys)
        one.feed(tokens[:, :cut])
        held = one.tensors()
        other = model.learning(batch=2, context=keys, tensors=held)
        assert torch.equal(rest(one), rest(other))
    with pytest.raises(UserError, match="not the tensors"):
        model.learning(batch=1, context=keys, tensors=held)
    with pytest.raises(UserError, match="not the tensors"):
        model.learning(batch=2, context=["level0.chunk=6"], tensors=held)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "no level of the model learns"),
        (["slow.chunk=8"], "of a level of the model: level0, level1"),
        (["level0.chunks=8"], "unknown"),
        (["level0.chunk=0"], "above 0"),
        (["level0.chunk=8", "level0.decay=0.5"], "a key of objective local"),
        (["level0.chunk=8", "level1.chunk=12"], "multiple of the shortest"),
        (["level0.chunk=8", "level0.objective=local"], "learns by ntp"),
        (["level0.learning_rate=0.1"], "does not change inside"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys: list[str], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match=said):
        nlscale.load(tmp_path, device="cpu").learning(context=keys)

"""The methods against forgetting, against the formulas written down plainly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from levels.level_runs import VOCABULARY, largest_difference, load, sequences, whole_parameters

from nlscale.config.vocabulary import HookConfig
from nlscale.continual.methods.ewc import Ewc, consolidate, penalty_gradient
from nlscale.continual.methods.lwf import Distilled, divergence
from nlscale.continual.methods.options import EwcOptions
from nlscale.errors import UserError
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.spectrum import levels_of, sync_group
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.optim.schedule import learning_rate
from nlscale.parallel.layout import process_groups
from nlscale.step.squares import mean_squares
from nlscale.step.swap import stand_in
from nlscale.train.loop import Trainer

STRENGTH, STEPS = 3.0, 4
PLAIN = [
    "levels=[1,2,4]", f"train.steps={STEPS}", "optimizer.rule=sgd", "optimizer.sgd.momentum=0",
    "optimizer.weight_decay=0", "optimizer.clip=0", "optimizer.learning_rate=0.05",
]  # fmt: skip


def penalised(overrides: list[str]) -> dict[str, Any]:
    """Fisher's squares of a model, and its weights after steps with the penalty; by the engine."""
    config = load([*PLAIN, *overrides])
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        begun = whole_parameters(trainer)
        squares = mean_squares(trainer, sequences(config, 90)[:3])
        trainer.kept["fisher"] = squares
        with stand_in(trainer, "fisher"):
            fisher = whole_parameters(trainer)
        assert largest_difference(whole_parameters(trainer), begun) == 0
        centre = {weights: weights.detach().clone() for weights in squares}

        def pull(group: GroupOptimizer, count: torch.Tensor) -> None:
            for w in main_parameters(group):
                each = penalty_gradient(STRENGTH, squares[w], centre[w], w.detach())
                w.grad.add_(each * count.to(each.dtype))

        trainer.optimizer.added.terms.append(pull)
        for step in range(1, STEPS + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            trainer.take_step(mine)
        return {"fisher": fisher, "parameters": whole_parameters(trainer)}


def plainly() -> dict[str, Any]:
    """The same in one process: a loss with a penalty, a backward pass, and gradient descent."""
    config = load(PLAIN)
    with process_groups(config):
        model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(model, config.run.seed, 0, 1)
        named, levels = dict(model.named_parameters()), levels_of(config)
        fisher = {name: torch.zeros_like(p) for name, p in named.items()}
        for one in sequences(config, 90)[:3]:
            model.zero_grad()
            model(one.tokens, one.targets).sum().backward()
            for name, p in named.items():
                fisher[name] += p.grad**2 / 3
        centre = {name: p.detach().clone() for name, p in named.items()}
        sums = {name: torch.zeros_like(p) for name, p in named.items()}
        counts = dict.fromkeys(named, 0)
        for step in range(1, STEPS + 1):
            model.zero_grad()
            batch = sequences(config, step)
            count = sum(b.counted_tokens for b in batch)
            penalty = sum((fisher[n] * (p - centre[n]) ** 2).sum() for n, p in named.items())
            loss = sum(model(b.tokens, b.targets).sum() for b in batch)
            (loss + STRENGTH * count * penalty).backward()
            rate = learning_rate(config.optimizer, step, STEPS)
            for name, p in named.items():
                sums[name] += p.grad
                counts[name] += count
                level, depth = model.level_and_depth(name)
                group = sync_group(levels[level], depth, config.model.layers, True)
                if group.due(step) or step == STEPS:
                    with torch.no_grad():
                        p -= rate * sums[name] / counts[name]
                    sums[name].zero_()
                    counts[name] = 0
        return {"fisher": fisher, "parameters": {n: p.detach() for n, p in named.items()}}


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    (found,) = world.run(1, plainly)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("ranks", "per_node", "layout"),
    [
        (2, 2, []),
        (
            4,
            2,
            ["parallel.tensor=2", "parallel.shard_optimizer=all", "levels.reduction=every-step"],
        ),
    ],
    ids=["data", "tensor-nodes"],
)
def test_squares_and_penalty_are_the_plain_ones(
    oracle: dict[str, Any], ranks: int, per_node: int, layout: list[str]
) -> None:
    found = world.run(ranks, penalised, layout, ranks_per_node=per_node)
    for rank in found:
        assert largest_difference(rank["fisher"], oracle["fisher"]) < 2e-4
        assert largest_difference(rank["parameters"], oracle["parameters"]) < 2e-5
    # the penalty is felt: without it these weights are others by far more
    assert max(float(f.max()) for f in oracle["fisher"].values()) > 0.1


def test_penalties_of_tasks_are_one() -> None:
    draw = torch.Generator().manual_seed(1)
    fishers = [torch.rand(50, generator=draw).double() for _ in range(3)]
    fishers[0][:5] = fishers[1][:5] = fishers[2][:5] = 0
    anchors = [torch.randn(50, generator=draw).double() for _ in range(3)]
    weights = torch.randn(50, generator=draw).double().requires_grad_()
    precision, centre = torch.zeros(50).double(), torch.zeros(50).double()
    for fisher, anchor in zip(fishers, anchors, strict=True):
        consolidate(precision, centre, fisher, anchor)
    both = zip(fishers, anchors, strict=True)
    sum(2.5 * (f * (weights - a) ** 2).sum() for f, a in both).backward()  # type: ignore[union-attr]
    found = penalty_gradient(2.5, precision, centre, weights.detach())
    assert weights.grad is not None and torch.allclose(found, weights.grad, atol=1e-12)


def test_gradients_that_lie_elsewhere_are_refused_before_the_first_step() -> None:
    config = load(["levels=[{name: fast}, {name: slow, period: 4, memory: host}]"])
    run = SimpleNamespace(config=config, trainer=SimpleNamespace(noted={}))
    hook = Ewc(cast(Any, run), HookConfig(name="ewc"), EwcOptions())
    with pytest.raises(UserError, match=r"level 'slow' lies elsewhere \(memory: host\)"):
        hook.begin()


def test_the_divergence_is_that_of_the_distributions() -> None:
    draw = np.random.default_rng(0)
    old, new, tau = draw.normal(size=(2, 3, 7)), draw.normal(size=(2, 3, 7)), 2.0
    p, q = (np.exp(x / tau) / np.exp(x / tau).sum(-1, keepdims=True) for x in (old, new))
    plain = tau**2 * (p * np.log(p / q)).sum(-1)
    student = torch.tensor(new, dtype=torch.float32, requires_grad=True)
    found = divergence(torch.tensor(old), student, tau)
    assert np.allclose(found.detach(), plain, atol=1e-5)
    found.sum().backward()
    # the gradient of the divergence: tau (q - p)
    assert student.grad is not None and np.allclose(student.grad, tau * (q - p), atol=1e-5)
    assert float(divergence(student.detach(), student.detach(), tau).abs().max()) < 1e-6


def distilled() -> tuple[float, float]:
    """How far the distilled loss and its gradient are from both terms added up by autograd."""
    config = load([])
    with process_groups(config):
        models = [Decoder(config, megatron_config(config), VOCABULARY) for _ in range(2)]
        for seed, model in enumerate(models):
            initialize(model, seed, 0, 1)
        new, old = models
        tokens = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(2))
        x, y = tokens[:, :-1], tokens[:, 1:]
        losses = Distilled(new, old, 0.5, 2.0)(x, y, None)
        losses.sum().backward()
        ours = {name: p.grad.clone() for name, p in new.named_parameters()}
        new.zero_grad()
        logits = new.logits(new.hidden(x, carry=False)[0])
        with torch.no_grad():
            before = F.softmax(old.logits(old.hidden(x, carry=False)[0]) / 2, -1)
        plain = F.cross_entropy(logits.permute(1, 2, 0), y, reduction="none").T
        apart = F.kl_div(F.log_softmax(logits / 2, -1), before, reduction="none").sum(-1)
        whole = plain + 0.5 * 4 * apart
        whole.sum().backward()
        theirs = {name: p.grad for name, p in new.named_parameters()}
        return float((losses - whole).abs().max()), largest_difference(ours, theirs)


def test_a_distilled_model_learns_from_both_terms() -> None:
    ((loss, gradient),) = world.run(1, distilled)
    assert loss < 1e-5 and gradient < 1e-4

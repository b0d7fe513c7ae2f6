"""muP: what a wide model starts from and how it learns, beside the width that was tuned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, train
from levels.level_runs import VOCABULARY, largest_difference, load, run_engine, sequences

from nlscale.checkpoint.diff import compare
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.plan.checks import check_sizes
from nlscale.step.trainer import Trainer

LEVELS = "levels=[1,2]"
HIDDEN = ("project.weight", "output.weight", "up.weight", "down.weight")
"""Names of what has more inputs in a wider model; `head.weight` is divided in the logits."""


def grows(name: str) -> bool:
    return name.endswith(HIDDEN)


@pytest.mark.parametrize(
    "kind",
    [[], ["model.cms=independent", "model.mixer=attention"], ["model.mixer=hope-pure"]],
    ids=["hope", "attention-independent", "hope-pure"],
)
def test_at_the_width_that_was_tuned_nothing_changes(kind: list[str]) -> None:
    keys = [LEVELS, "train.steps=3", "optimizer.learning_rate=0.01", *kind]
    (standard,) = world.run(1, run_engine, keys)
    (same,) = world.run(1, run_engine, [*keys, "model.mup_base_width=32"])
    (wider,) = world.run(1, run_engine, [*keys, "model.mup_base_width=16"])
    assert same["hashes"] == standard["hashes"] and same["losses"] == standard["losses"]
    assert wider["losses"] != standard["losses"]


def test_what_grows_with_the_width_starts_smaller_and_the_rest_as_ever(build, mixer, cms) -> None:
    keys = [mixer, cms, "levels=[1,4]", "model.d_model=64", "model.heads=4", "model.hidden=96"]
    plain, wide = (
        dict(build(*keys, *more).named_parameters()) for more in ([], ["model.mup_base_width=16"])
    )
    grown = [name for name in plain if grows(name)]
    assert len(grown) == 2 * (2 + 2 * 2)
    for name, weight in wide.items():
        # four times as wide: half the standard deviation, exactly
        assert torch.equal(weight, plain[name] / 2 if name in grown else plain[name]), name


def test_logits_are_divided_by_how_much_wider_the_model_is(build, tokens) -> None:
    plain, wide = build(), build("model.mup_base_width=16")
    wide.load_state_dict(plain.state_dict())
    with torch.no_grad():
        x = plain.hidden(tokens)[0]
        assert torch.equal(wide.hidden(tokens)[0], x)
        assert torch.allclose(wide.logits(x), plain.logits(x) / 2, rtol=1e-6, atol=0)


def one_update(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a rank of a world: the parameters before and after a first step."""
    config = load(
        ["train.steps=1", "optimizer.warmup_steps=0", "optimizer.min_learning_rate=1", *overrides]
    )
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        before = {n: p.detach().clone() for n, p in trainer.named_parameters().items()}
        trainer.take_step(sequences(config, 1))
        after = {n: p.detach().clone() for n, p in trainer.named_parameters().items()}
    return before, after


TWO_RATES = "levels=[{name: a, period: 1}, {name: b, period: 1, learning_rate: 0.25}]"
BARE = ["optimizer.learning_rate=0.01", "optimizer.clip=0", "optimizer.eps=1e-30", TWO_RATES]
WIDER = "model.mup_base_width=8"  # of 32


def test_each_parameter_moves_at_its_own_learning_rate(cms: str) -> None:
    # Adam's first step is the learning rate times the sign of the gradient
    keys = [*BARE, WIDER, "optimizer.weight_decay=0", cms]
    ((before, after),) = world.run(1, one_update, keys)
    for name in before:
        rate = 0.01 * (0.25 if ".mlps.1." in name or ".norms.1." in name else 1.0)
        rate /= 4 if grows(name) else 1
        moved = (after[name] - before[name]).abs()
        moved = moved[moved > 0]  # rows of the embedding of no token have no gradient
        assert moved.numel() > 0.5 * before[name].numel(), name
        assert torch.allclose(moved, torch.tensor(rate), rtol=2e-3), name


def gains(name: str) -> bool:
    """Whether it scales what it multiplies: drawn to zero, it would take that along."""
    return "norm" in name


def test_a_weight_forgets_as_fast_at_every_width_and_gains_do_not() -> None:
    keys = [*BARE, WIDER]
    runs = [
        world.run(1, one_update, [*keys, f"optimizer.weight_decay={decay}"])[0]
        for decay in (0.0, 0.5)
    ]
    (before, plain), (_, decayed) = runs
    assert any(gains(name) and weight.dim() > 1 for name, weight in before.items())
    for name, weight in before.items():
        rate = 0.01 * (0.25 if ".mlps.1." in name or ".norms.1." in name else 1.0)
        shrunk = plain[name] - decayed[name]
        forgets = weight.dim() > 1 and not gains(name)
        expected = rate * 0.5 * weight if forgets else torch.zeros_like(weight)
        assert torch.allclose(shrunk, expected, rtol=1e-3, atol=2e-7), name


def test_adam_takes_the_same_step_where_gradients_are_smaller() -> None:
    # eps as large as the gradients: it is divided as they are, so that it damps as much
    keys = ["optimizer.learning_rate=0.01", "optimizer.clip=0", "optimizer.weight_decay=0"]
    keys += ["model.mixer=attention", "model.init_std=0.001", "optimizer.eps=0.03", "levels=[1]"]
    moved = []
    for width, heads in ((32, 4), (64, 8), (128, 16)):
        sizes = [f"model.d_model={width}", f"model.heads={heads}", "model.mup_base_width=32"]
        ((before, after),) = world.run(1, one_update, [*keys, *sizes])
        moved.append((after["head.weight"] - before["head.weight"]).square().mean().sqrt().item())
    assert moved[0] < 0.005, "eps must matter to be a test of it"
    assert moved[1:] == pytest.approx([moved[0]] * 2, rel=0.05)


LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp-pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "dp4": (4, []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [["model.mixer=hope"], ["model.cms=independent"]])
def test_every_layout_trains_the_same_wide_model(layout: str, kind: list[str]) -> None:
    ranks, spread = LAYOUTS[layout]
    keys = [LEVELS, "data.sequence_length=16", "train.steps=4", WIDER, *kind]
    keys += ["model.init_std=0.2", "optimizer.eps=1e-3"]  # see test_parallel_layouts.py
    (one,) = world.run(1, run_engine, keys)
    spread_out = world.run(ranks, run_engine, [*keys, *spread])
    for result in spread_out:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest_difference(spread_out[0]["parameters"], one["parameters"]) < 1e-5


@pytest.mark.parametrize("layout", ["tp2", "dp4"])
def test_resuming_is_bitwise(tmp_path: Path, layout: str) -> None:
    ranks, spread = LAYOUTS[layout]
    keys = ["levels=[1,2]", "data.sequence_length=16", "train.steps=5", WIDER]
    whole = world.run(ranks, train, [*keys, *spread], tmp_path / "whole", (3,))[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    shutil.rmtree(checkpoint(tmp_path / "rest", 5).path)
    resumed = world.run(ranks, train, [*keys, *spread], tmp_path / "rest", (), True)[0]
    assert resumed["losses"] == {step: whole["losses"][step] for step in (4, 5)}
    result = compare(checkpoint(tmp_path / "rest", 5), checkpoint(tmp_path / "whole", 5))
    assert result["bitwise"], result
    assert largest_difference(resumed["parameters"], whole["parameters"]) == 0


def test_base_widths_that_cannot_be_are_refused() -> None:
    sizes = ["data.dir=none", "model.d_model=512", "model.heads=8", "model.vocabulary=61"]
    for base in (64, 128, 1024):
        check_sizes(recipe.load(None, [*sizes, f"model.mup_base_width={base}"]).config, 1)
    for base, says in (
        (0, "model.mup_base_width is 0; it must be above 0"),
        (-64, "above 0"),
        (100, "100 is not a whole number of heads of 64 .* use 64 or 128"),
        (32, "32 is not a whole number of heads of 64 .* use 64, or model.heads"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            check_sizes(recipe.load(None, [*sizes, f"model.mup_base_width={base}"]).config, 1)
        assert "\n" not in str(refused.value)
    sizes += ["model.mixer=attention", "model.attention.head_dim=48", "model.mup_base_width=64"]
    with pytest.raises(UserError, match=r"heads of 48 \(model.attention.head_dim\).* 48 or 96"):
        check_sizes(recipe.load(None, sizes).config, 1)

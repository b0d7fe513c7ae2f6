"""The tables: every name has what makes it, and an unknown one is an error wherever it is asked."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from asked import nlscale

from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, RULES, ModelConfig, OptimizerConfig
from nlscale.errors import UserError
from nlscale.evaluate import table as evaluations
from nlscale.evaluate import trained as asked_of_trained
from nlscale.evaluate.fields import ANSWERS
from nlscale.model.flops import flops_by_part
from nlscale.model.mixers import table as mixers
from nlscale.model.sizes import level_parameters
from nlscale.optim import table as rules
from nlscale.plan.activations import Activations
from nlscale.plan.checks import check_sizes


def test_vocabulary_and_tables_hold_the_same_names() -> None:
    assert list(mixers._TABLE) == MIXERS and list(rules._TABLE) == RULES


@pytest.mark.parametrize(
    "entry",
    [*mixers._TABLE.values(), *rules._TABLE.values(), *evaluations._TABLE.values()],
    ids=lambda entry: entry.made_by,
)
def test_what_makes_an_entry_is_there(entry: Any) -> None:
    module, _, name = entry.made_by.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (mixers.mixer, "no mixer is called 'hopes'; did you mean 'hope'?"),
        (
            rules.rule,
            "no optimizer rule is called 'hopes'; there are adamw, sgd, muon, m3, delta, deep",
        ),
        (
            evaluations.evaluation,
            "no evaluation is called 'hopes'; there are loss, positions, task",
        ),
    ],
)
def test_an_unknown_name_names_the_nearest(ask: Callable[[str], Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ask("hopes")
    assert str(caught.value) == said


def test_an_unknown_mixer_is_never_counted_as_another() -> None:
    config = recipe.load(None, ["data.dir=x", "model.vocabulary=64"]).config
    config.model.mixer = "unknown"
    batch = Activations(config, 64)
    for ask in (
        lambda: flops_by_part(config, 64),
        lambda: level_parameters(config, 64),
        lambda: check_sizes(config, 1),
        lambda: batch.blocks([0]),
        batch.transient,
    ):
        with pytest.raises(UserError, match="no mixer is called 'unknown'"):
            ask()


def test_a_memory_of_which_something_is_not_said_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.memory.lambda_init is null, and model.mixer=hope"):
        mixers.mixer("hope").check(ModelConfig(mixer="hope"))


def test_a_rule_returns_what_can_be_sharded() -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(2))
    rule = rules.Rule("tests_of_rules:sgd", state=())
    module: Any = types.ModuleType("tests_of_rules")
    module.sgd = lambda config, width, parameters: torch.optim.SGD(parameters, lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tests_of_rules", module)
        with pytest.raises(UserError, match="returned SGD; megatron-core's sharded optimizer"):
            rule.make(OptimizerConfig(), 1.0, [parameter])
    with pytest.raises(UserError, match="a tuple of names, not 'momentum'"):
        rules.Rule("a:b", state="momentum")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weights", "window", "a/b", "a@1"])
def test_a_rule_cannot_take_the_names_of_a_checkpoint(name: str) -> None:
    with pytest.raises(UserError, match="an optimizer rule cannot call what it keeps"):
        rules.Rule("a:b", state=(name,))


def test_what_is_asked_of_a_trained_model_is_there_and_described() -> None:
    for name, one in asked_of_trained.TRAINED.items():
        for made in (one.arguments, one.made_by, one.shown_by, one.drawn_by or one.made_by):
            module, _, function = made.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
        assert any(name in of.split(", ") for of in ANSWERS), f"{name}: no field is described"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("tests_of_options:json", "evaluation 'mine': argument --json: conflicting option string"),
        ("tests_of_options:cache", "evaluation 'mine': an option is called 'models', as one that"),
        ("tests_of_options:gone", "'tests_of_options:gone' cannot be imported: "),
    ],
)
def test_an_evaluation_of_someone_else_that_cannot_be_asked_is_one_line(
    arguments: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module: Any = types.ModuleType("tests_of_options")
    module.json = lambda parser: parser.add_argument("--json")
    module.cache = lambda parser: parser.add_argument("--models")
    monkeypatch.setitem(sys.modules, "tests_of_options", module)
    new = asked_of_trained.Trained("a line", "more", arguments, "a:b", "a:b")
    monkeypatch.setattr(asked_of_trained, "TRAINED", dict(asked_of_trained.TRAINED))
    monkeypatch.setattr("nlscale.cli.eval.TRAINED", asked_of_trained.TRAINED)
    asked_of_trained.register("mine", new)
    assert nlscale("eval", "mine", "a run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line

"""What goes with the nested form of CMS, and what is refused in one line."""

from __future__ import annotations

import pytest

from nlscale.checkpoint.export.class_keys import class_keys
from nlscale.config import recipe
from nlscale.config.in_context import learning
from nlscale.config.parts import Parts, parts_of, parts_of_saved
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_hidden, level_parameters

COPIES = "levels=[1,4,16]"


def load(*overrides: str, levels: str = COPIES) -> Config:
    return recipe.load(None, ["data.dir=none", "model.cms=nested", levels, *overrides]).config


def test_the_first_level_with_an_mlp_has_it_and_the_others_hold_copies() -> None:
    config = load("model.vocabulary=64")
    assert parts_of(config) == Parts((0,), 0, 0, 0, None, copies=(1, 2))
    assert parts_of_saved(recipe.to_plain(config)) == parts_of(config)
    plain = recipe.load(None, ["data.dir=none", "levels=[1]", "model.vocabulary=64"]).config
    assert level_hidden(config) == [*level_hidden(plain), 0, 0]
    assert level_parameters(config, 64) == [*level_parameters(plain, 64), 0, 0]
    own = "levels=[{parts: [mixer, embedding, head]}, {period: 2, parts: [cms, norms]}, 4]"
    assert parts_of(load(levels=own)) == Parts((1,), 0, 0, 0, 1, copies=(2,))


def test_a_trained_mlp_may_learn_from_what_it_reads_and_no_copy_does() -> None:
    assert [each.mlp for each in learning(load(), ["level0.chunk=8"])] == [0]
    with pytest.raises(UserError, match="'level1' holds a copy of the MLP of 'level0'"):
        learning(load(), ["level1.chunk=8"])


def test_an_export_is_of_a_model_with_one_mlp() -> None:
    levels = class_keys(load())["levels"]
    assert [bool(level["hidden"]) for level in levels] == [True, False, False]
    assert [level["parameters"] for level in levels[1:]] == [[], []]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["levels.spectrum.0.outer.every=3"], "levels.spectrum.0.outer: model.cms=nested makes"),
        (
            ["levels.spectrum.1.local=true", "levels.spectrum.1.outer.every=3"],
            "levels.spectrum.1.local: model.cms=nested makes",
        ),
        (["levels.spectrum.0.memory=host"], "levels.spectrum.0.memory: model.cms=nested makes"),
        (["levels.spectrum.0.context.chunk=8"], "levels.spectrum.0.context: model.cms=nested"),
        (["levels.period_warmup.steps=100 steps"], "levels.period_warmup: model.cms=nested"),
        (["levels.spectrum.1.hidden=64"], "levels.spectrum.1.hidden says nothing; level"),
        (["levels.spectrum.2.learning_rate=0.5"], "levels.spectrum.2.learning_rate says nothing"),
        (["levels.spectrum.1.optimizer={rule: sgd}"], "levels.spectrum.1.optimizer says nothing"),
        (["levels.spectrum.1.wire=int8"], "levels.spectrum.1.wire says nothing"),
        (["levels.spectrum.2.parts=[cms,mixer]"], "levels.spectrum.2.parts names mixer; level"),
        (["levels.spectrum.0.copy_rate=0.4"], "copy_rate is 0.4, and level 'level0' holds no"),
        (
            ["model.cms=sequential", "levels.spectrum.1.copy_rate=0.4"],
            "levels.spectrum.1.copy_rate is 0.4, and level",
        ),
        (["levels.spectrum.1.copy_rate=0"], "levels.spectrum.1.copy_rate"),
        (["levels.spectrum.1.copy_rate=1.5"], "levels.spectrum.1.copy_rate"),
        (
            ["levels.spectrum.1.period=3"],
            "levels.spectrum.2: period 16 steps is not a multiple, twice",
        ),
        (["levels.spectrum.2.period=4"], "give it 8 steps"),
        (["levels.spectrum.0.period=3"], "give it 6 steps"),
    ],
)
def test_what_copies_do_not_go_with_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        levels_of(load(*overrides))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)

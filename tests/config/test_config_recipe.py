"""Recipes: what a user may write, what it becomes, and what a mistake says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, CmsForm, Config, Reduction
from nlscale.errors import UserError

Write = Callable[[str], Path]
DATA = "data: {dir: shards}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return path

    return to_file


def config_of(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=shards", *overrides]).config


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("train.stepz=3", "train.stepz", "did you mean 'train.steps'"),
        ("trian.steps=3", "trian", "did you mean 'train'"),
        ("steps=3", "steps", "did you mean 'train.steps'"),
        ("run.project=x", "run.project", "did you mean 'wandb.project'"),
        ("model.memory.lambdainit=1", "model.memory.lambdainit", "'model.memory.lambda_init'"),
        ("wholly.foreign=3", "wholly", "nlscale config --keys"),
        ("train.steps=many", "train.steps", "an integer"),
        ("train.steps=2.5", "train.steps", "an integer"),
        ("train.steps=1e3", "train.steps", "write 1000"),
        ("train.steps=", "train.steps", "null is not an integer"),
        ("train.steps={a: 1}", "train.steps", "an integer"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate", "a number"),
        ("model.memory.c=on", "model.memory.c", "a number"),
        ("levels.stagger=maybe", "levels.stagger", "true or false"),
        ("run.dir=null", "run.dir", "a text"),
        ("model.mixer=hop", "model.mixer", "hope, hope-pure, hope-paper, gated-delta, deltanet"),
        ("model.mixer=hope_pure", "model.mixer", "hope-pure"),
        ("model.mixer=null", "model.mixer", "gated-delta"),
        ("levels.reduction=[deferred]", "levels.reduction", "deferred, every-step"),
        ("train=3", "train", "such as train.steps"),
        ("levels=3", "levels", "levels=[1,4,16]"),
        ("levels=1,4", "levels", "levels=[1,4,16]"),
        ("levels.spectrum=4", "levels.spectrum", "levels=[1,4,16]"),
        ("levels.spectrum.0.period=4", "levels.spectrum.0.period", "levels=[1,4,16]"),
        ("levels=[1,often]", "levels.spectrum.1.period", "'16 steps' or '8M tokens'"),
        ("levels=[0,4]", "levels.spectrum.0.period", "'1 step'"),
        ("levels=[1,2.5]", "levels.spectrum.1.period", "whole"),
        ("levels=[1,null]", "levels.spectrum.1.period", "a text"),
        ("levels=[{perod: 4}]", "levels.spectrum.0.perod", "'levels.spectrum.0.period'"),
        ("levels=[1,{hidden: x}]", "levels.spectrum.1.hidden", "an integer"),
        ("train.steps", "train.steps", "key=value"),
        ("train.steps=[1", "train.steps", "not a YAML value"),
        ("train.steps=${train.stepz}", "train.steps", "train.stepz"),
    ],
)
def test_a_wrong_override_names_key_and_fix(override: str, key: str, fix: str) -> None:
    message = message_of(lambda: config_of(override))
    assert key in message and fix in message


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("levels.spectrum.2.period=8", "use 0 to 1"),
        ("levels.spectrum.-1.period=8", "use 0 to 1"),
        ("levels.spectrum.slow.period=8", "use 0 to 1"),
        ("levels.1.period=8", "'levels.spectrum.1.period'"),
        ("levels.spectrum[1].period=8", "'levels.spectrum.1.period'"),
    ],
)
def test_a_wrong_level_index_names_the_right_ones(override: str, fix: str) -> None:
    message = message_of(lambda: config_of("levels=[1,4]", override))
    assert override.partition("=")[0] in message and fix in message


def test_missing_data_dir_is_named() -> None:
    assert message_of(lambda: recipe.load(None, [])).startswith("data.dir is not set")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("train:\n  stepz: 3\n", 2, "train.steps"),
        ("train:\n  steps: abc\n", 2, "an integer"),
        ("model:\n  layers: 2\n  mixer: hop\n", 3, "hope-pure"),
        ("train:\n", 1, "train is empty"),
        ("levels:\n  - 1\n  - {hidden: x}\n", 3, "levels.spectrum.1.hidden"),
    ],
)
def test_a_mistake_in_a_recipe_names_its_line(
    write: Write, text: str, line: int, says: str
) -> None:
    path = write(text + DATA)
    message = message_of(lambda: recipe.load(path))
    assert f"{path} line {line}" in message and says in message


@pytest.mark.parametrize("text", ["a: [b", "train: {steps: 1\n", "a: 1\na: 2\n", "a:\n\t- b"])
def test_bad_yaml_names_file_and_line(write: Write, text: str) -> None:
    path = write(text)
    assert f"{path} line" in message_of(lambda: recipe.load(path))


@pytest.mark.parametrize("text", ["- 1", "3", "hello", "train"])
def test_a_file_that_is_no_mapping_is_no_recipe(write: Write, text: str) -> None:
    path = write(text)
    message = message_of(lambda: recipe.load(path))
    assert str(path) in message and "mapping" in message


def test_bytes_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in message_of(lambda: recipe.load(path))


def test_a_missing_recipe_lists_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = message_of(lambda: recipe.load("absent.yaml"))
    assert message.startswith("no recipe at absent.yaml; give a path, or one of ")
    assert all(path.stem in message for path in RECIPES)
    assert "before it" in message_of(lambda: recipe.load("train.steps=3"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_load(path: Path, tmp_path: Path) -> None:
    loaded = recipe.load(path)
    written = tmp_path / "config.yaml"
    recipe.write(loaded.config, written)
    assert recipe.load(written).config == loaded.config


def test_there_are_recipes() -> None:
    assert RECIPES


def test_recipes_do_not_touch_each_other() -> None:
    before = config_of("train.steps=7")
    other = config_of("levels=[1,4]", "optimizer.muon.momentum=0.5", "resume.allow=[levels]")
    other.levels.spectrum.append(other.levels.spectrum[0])
    other.run.imports.append("a_module")
    other.model.memory.chunk = 1
    assert config_of("train.steps=7") == before != other


def test_levels_as_a_list_of_periods() -> None:
    spectrum = config_of("levels=[1,4,8M tokens]").levels.spectrum
    assert [level.period for level in spectrum] == ["1", "4", "8M tokens"]
    assert [level.name for level in spectrum] == ["level0", "level1", "level2"]


def test_levels_as_a_list_of_mappings(write: Write) -> None:
    path = write(
        DATA + "levels:\n  - {name: fast, period: 1 step}\n  - {period: 16, hidden: 24}\n  - 32\n"
    )
    spectrum = recipe.load(path).config.levels.spectrum
    assert [level.name for level in spectrum] == ["fast", "level1", "level2"]
    assert [level.period for level in spectrum] == ["1 step", "16", "32"]
    assert [level.hidden for level in spectrum] == [None, 24, None]


def test_one_level_may_be_overridden(write: Write) -> None:
    path = write(DATA + "levels: [{name: a, period: 1}, {name: b, period: 4, learning_rate: 0.5}]")
    for override in ("levels.spectrum.1.period=64k tokens", "levels.spectrum.1=64k tokens"):
        spectrum = recipe.load(path, [override]).config.levels.spectrum
        assert [(level.name, level.period) for level in spectrum] == [
            ("a", "1"),
            ("b", "64k tokens"),
        ]
        assert spectrum[1].learning_rate == 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_a_list_of_levels_keeps_the_other_keys_of_levels(write: Write, order: int) -> None:
    path = write(DATA + "levels: {reduction: every-step}")
    overrides = ["levels=[1,4]", "levels.stagger=false"][::order]
    levels = recipe.load(path, overrides).config.levels
    assert (len(levels.spectrum), levels.stagger) == (2, False)
    assert levels.reduction == Reduction.every_step


def test_the_last_override_wins_over_earlier_ones_and_the_recipe(write: Write) -> None:
    path = write(DATA + "train: {steps: 1, global_batch: 64}")
    config = recipe.load(path, ["train.steps=2", "train.steps=3"]).config
    assert (config.train.steps, config.train.global_batch) == (3, 64)
    config = recipe.load(path, ["train.steps=2", "train={steps: 5}"]).config
    assert (config.train.steps, config.train.global_batch) == (5, 64)


def test_scientific_numbers_are_numbers(write: Write) -> None:
    path = write(DATA + "optimizer: {learning_rate: 4e-3, eps: 1E-6}")
    optimizer = recipe.load(path, ["optimizer.weight_decay=1e-2"]).config.optimizer
    assert (optimizer.learning_rate, optimizer.eps, optimizer.weight_decay) == (4e-3, 1e-6, 1e-2)


def test_a_value_may_hold_an_equals_sign_and_an_interpolation() -> None:
    config = config_of("wandb.name=a=b", "train.validate_every=${train.steps}", "train.steps=7")
    assert config.wandb.name == "a=b"
    assert config.train.validate_every == 7


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_an_interpolation_changes_nothing_else(name: str) -> None:
    """What refers to another key is read by OmegaConf; what does not, is not."""
    given = ["run.dir=x", "wandb.name=x", "model.pattern=[hope, {mixer: attention}]"]
    if "mixture" not in name:
        given += ["data.dir=[{dir: a, weight: 2}, {dir: b}]"]
    plain = recipe.load(name, given).config
    assert repr(recipe.load(name, [*given, "wandb.name=${run.dir}"]).config) == repr(plain)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_resolved_configuration_gives_the_same_configuration(
    tmp_path: Path, mixer: str
) -> None:
    config = config_of(
        f"model.mixer={mixer}",
        "model.cms=independent",
        "levels=[1,{name: 'null', period: 8M tokens}]",
        "levels.reduction=every-step",
        "optimizer.learning_rate=3e-4",
        "wandb.name='5'",
        "run.dir='runs/a: b'",
    )
    path = tmp_path / "config.yaml"
    recipe.write(config, path)
    assert recipe.load(path).config == config
    assert config.model.mixer == mixer and config.model.cms is CmsForm.independent
    plain = recipe.to_plain(config)
    assert plain["model"]["mixer"] == mixer
    assert plain["levels"]["reduction"] == "every-step"


def test_a_preset_fills_what_the_user_left_open() -> None:
    memory = config_of("model.mixer=hope-pure").model.memory
    assert (memory.lambda_init, memory.c, memory.eta_bias) == (1.0, 1.0, -2.0)
    memory = config_of("model.mixer=hope-paper").model.memory
    assert (memory.anchored, memory.output_gate) == (False, False)
    assert config_of("model.mixer=attention").model.memory.anchored is None


def test_an_explicit_memory_key_wins_over_the_preset(write: Write) -> None:
    path = write(DATA + "model: {mixer: hope-pure, memory: {c: 0.0, anchored: false}}")
    memory = recipe.load(path, ["model.memory.output_gate=false"]).config.model.memory
    assert (memory.c, memory.anchored, memory.output_gate) == (0.0, False, False)
    assert memory.eta_bias == -2.0


def origin(loaded: recipe.Recipe, key: str) -> str:
    return recipe.explain(loaded, key).splitlines()[1].strip().removeprefix("from: ")


def test_explain_says_where_a_value_came_from(write: Write) -> None:
    path = write(
        DATA
        + "model:\n  mixer: hope-pure\n  memory: {c: 0.5}\n"
        + "levels:\n  - 1\n  - {name: b, period: 4}\ntrain:\n  steps: 3\n"
    )
    loaded = recipe.load(path, ["train.micro_batch=2", "levels.spectrum.1.period=8"])
    for key, expected in {
        "train.steps": f"{path} line 9",
        "train.micro_batch": "the command line",
        "train.global_batch": "the default, nlscale/config/vocabulary.py",
        "model.memory.c": f"{path} line 4",
        "model.memory.eta_bias": "the preset of model.mixer=hope-pure",
        "model.memory.chunk": "the default, nlscale/config/vocabulary.py",
        "levels.spectrum": f"{path} line 6",
        "levels.spectrum.0.period": f"{path} line 6",
        "levels.spectrum.0.name": "its place in levels.spectrum",
        "levels.spectrum.1.name": f"{path} line 7",
        "levels.spectrum.1.period": "the command line",
        "levels.spectrum.1.hidden": "the default, nlscale/config/vocabulary.py",
    }.items():
        assert origin(loaded, key) == expected, key


def test_explain_after_the_levels_were_replaced(write: Write) -> None:
    path = write(DATA + "levels: [{name: a, period: 1}, {name: b, period: 4, hidden: 8}]")
    loaded = recipe.load(path, ["levels=[1,{period: 16}]"])
    assert origin(loaded, "levels.spectrum.0.period") == "the command line"
    assert origin(loaded, "levels.spectrum.1.period") == "the command line"
    assert origin(loaded, "levels.spectrum.1.hidden") == "the default, nlscale/config/vocabulary.py"


def test_explain_shows_value_and_meaning() -> None:
    loaded = recipe.load(None, ["data.dir=x", "model.cms=independent", "train.steps=7"])
    assert recipe.explain(loaded, "train.steps").splitlines() == [
        "train.steps = 7",
        "  from: the command line",
        "  Optimizer steps of the run.",
        "  read: docs/concepts/data.md#steps-tokens-and-epochs",
    ]
    assert recipe.explain(loaded, "model.cms").startswith("model.cms = independent\n")
    assert "steps: 7" in recipe.explain(loaded, "train")


def test_explain_says_what_a_level_has_of_the_optimizer() -> None:
    own = "{period: 4, optimizer: {muon: {momentum: 0.8}, matrices: {learning_rate: 2}}}"
    loaded = recipe.load(None, ["data.dir=x", f"levels=[1,{own}]", "optimizer.rule=muon"])

    def lines(key: str) -> list[str]:
        return recipe.explain(loaded, f"levels.spectrum.{key}").splitlines()[:2]

    default = "the default, nlscale/config/vocabulary.py"
    assert lines("1.optimizer.rule") == [
        "levels.spectrum.1.optimizer.rule = muon",
        "  from: optimizer.rule of the run: the command line",
    ]
    assert lines("1.optimizer.muon.momentum") == [
        "levels.spectrum.1.optimizer.muon.momentum = 0.8",
        "  from: the command line",
    ]
    assert lines("1.optimizer.matrices.learning_rate")[0].endswith("= 2.0")
    assert lines("0.optimizer.muon.momentum") == [
        "levels.spectrum.0.optimizer.muon.momentum = 0.95",
        f"  from: optimizer.muon.momentum of the run: {default}",
    ]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.stes", "train.steps"),
        ("levels.spectrum.9.period", "use 0 to 0"),
        ("levels.spectrum.0.perod", "levels.spectrum.0.period"),
        ("levels.spectrum.0.optimizer.rul", "did you mean 'optimizer.rule'"),
        ("levels.spectrum.0.optimizer.learning_rate", "beside its optimizer"),
        ("", "--keys"),
    ],
)
def test_explain_of_no_key_names_the_nearest(key: str, says: str) -> None:
    loaded = recipe.load(None, ["data.dir=x"])
    assert says in message_of(lambda: recipe.explain(loaded, key))

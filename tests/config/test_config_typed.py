"""What is typed is what a key gets: texts as typed, numbers that mean one thing, paths, ranges."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from nlscale.cluster.machines import Cluster, load_cluster
from nlscale.config import recipe, trees
from nlscale.config.fields import Range, expanded
from nlscale.config.keys import hints_of, item_of, key_of
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import _File

CLUSTER = """name: c
nodes: 2
gpus_per_node: 8
inter_node_gbit: 100
gpu_memory_gib: 80
"""


def config_of(*overrides: str, file: Path | None = None) -> Config:
    return recipe.load(file, ["data.dir=shards", *overrides]).config


def message_of(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        config_of(*overrides, file=file)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


TYPED = [
    "007",
    "1_1",
    "12:30",
    "0123",
    "1e6",
    "0x10",
    "yes",
    "2026-11-26",
    "runs/try #1",
    ".5",
    "-",
]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("key", ["run.dir", "wandb.name", "levels.spectrum.0.name"])
def test_a_text_takes_the_characters_as_typed(key: str, text: str, tmp_path: Path) -> None:
    def read(config: Config) -> str:
        where = {
            "run.dir": config.run.dir,
            "wandb.name": config.wandb.name,
            "levels.spectrum.0.name": config.levels.spectrum[0].name,
        }
        return str(where[key])

    assert read(config_of("levels=[1]", f"{key}={text}")) == text
    sections = key.replace("spectrum.0.name", "").strip(".").split(".")
    inner = f"[{{name: {text}, period: 1}}]" if "levels" in key else f"{{{sections[1]}: {text}}}"
    if "#" not in text:  # of a file, that is a comment
        file = tmp_path / "a.yaml"
        file.write_text(f"{sections[0]}: {inner}\n")
        assert read(config_of(file=file)) == text
    again = tmp_path / "config.yaml"
    config = config_of("levels=[1]", f"{key}={text}")
    recipe.write(config, again)
    assert read(recipe.load(again).config) == text


def test_null_and_quotes_on_the_command_line() -> None:
    assert config_of("wandb.name=null").wandb.name is None
    assert config_of("wandb.name='null'").wandb.name == "null"
    assert config_of('wandb.name="a # b"').wandb.name == "a # b"
    assert config_of("wandb.name='a' b'").wandb.name == "'a' b'"  # not quotes around the whole
    assert message_of("run.dir=").startswith("run.dir is empty")
    assert "null is not a text" in message_of("run.dir=null")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("resume.start=", "resume.start is empty; give a text, or null"),
        ("run.dir = runs/x", "begins or ends with a space"),
        ("run.dir=" + "a" * 300, "255 bytes"),
        ("run.dir=???", "is not set"),
        ("run.dir=null", "null is not a text"),
        ("levels.spectrum.\u00b2=4", "is not an index"),
    ],
    ids=range(6),
)
def test_an_unset_variable_and_its_like_do_not_become_something_else(
    override: str, says: str
) -> None:
    assert says in message_of("levels=[1]", override)


def test_an_entry_of_levels_is_a_period_or_keys() -> None:
    spectrum = config_of("levels=[1,4]", "levels.spectrum.1={learning_rate: 0.5}").levels.spectrum
    assert (spectrum[1].period, spectrum[1].learning_rate) == ("4", 0.5)
    assert config_of("levels=[1,4]", "levels.spectrum.1=8").levels.spectrum[1].period == "8"


def test_anchors_of_anchors_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file.write_text("\n".join(lines))
    assert "more than 100,000 values" in message_of(file=file)


@pytest.mark.parametrize(
    "line",
    [
        "slurm: {account: $TEAM}",
        "slurm: {container: ~/image.sqsh}",
        "slurm: {mounts: '/a:/a,$HOME/d:/d'}",
        "environment: {HF_HOME: ~/hf}",
        "environment: {A: '${HOME}/x'}",
        "interface: $IF",
        "hosts: [a, $B]",
    ],
)
def test_what_nothing_expands_is_refused_in_cluster_files(line: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{CLUSTER}launch:\n  {line}\n")
    with pytest.raises(UserError, match="which nothing expands there"):
        load_cluster(file)


def test_texts_of_a_cluster_file_are_as_typed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        CLUSTER + "launch:\n  environment: {A: 010, B: yes, C: 1e6}\n"
        "  setup: export X=${HOME}/bin\n  slurm: {account: 0123, options: [--x, 1_1]}\n"
    )
    launch = load_cluster(file).launch
    assert launch.environment == {"A": "010", "B": "yes", "C": "1e6"}
    assert launch.setup == "export X=${HOME}/bin"  # of the shell, no interpolation
    assert (launch.slurm.account, launch.slurm.options) == ("0123", ["--x", "1_1"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=010", "write 10"),
        ("train.steps=-07", "write -7"),
        ("train.steps=0x10", "not an integer"),
        ("train.steps=1:30", "not an integer"),
        ("train.steps=١", "not an integer"),
        ("optimizer.clip=010", "write 10"),
        ("optimizer.clip=1:30", "not a number"),
        ("train={steps: 010}", "write 10"),
        ("levels=[1,010]", "levels.spectrum.1.period"),
        ("checkpoint.every=010 steps", "checkpoint.every"),
        ("levels.stagger=2", "true or false"),
    ],
)
def test_a_number_that_could_mean_two_things_is_refused(override: str, says: str) -> None:
    from nlscale.plan.checks import check_sizes

    with pytest.raises(UserError, match=says):
        check_sizes(config_of(override), 1)


@pytest.mark.parametrize("quotes", ["", "'", '"'])
def test_a_number_in_quotes_is_a_number(quotes: str) -> None:
    assert config_of(f"train.steps={quotes}1_000{quotes}").train.steps == 1000


PATHS = ("run.dir", "run.weights", "data.dir", "resume.start")


@pytest.mark.parametrize("key", PATHS)
def test_a_url_is_a_place_for_data_alone(key: str) -> None:
    if key == "data.dir":
        assert config_of(f"{key}=s3://bucket/x/").data.dir == "s3://bucket/x"
        assert "data.dir holds credentials" in message_of(f"{key}=http://me:secret@host/x")
        assert "is not a URL of a folder" in message_of(f"{key}=simplecache::s3://bucket/x")
    else:
        assert "s3:// names a service" in message_of(f"{key}=s3://bucket/x")


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gs:/bucket/x", "gs:/"),
        ("me@host:/x", "host:/"),
        ("$HOME/x", r"\$HOME"),
        ("a/${b}", "b"),
        ("' '", "is empty"),
        ("a\nb", "control character"),
        ("~nobody-of-that-name/x", "nobody's home"),
    ],
)
def test_a_path_that_is_none_is_refused(key: str, text: str, says: str) -> None:
    import re

    message = message_of(f"{key}={text}")
    assert key in message and re.search(says, message)


@pytest.mark.parametrize("key", PATHS)
def test_a_home_is_expanded(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/them")
    section, name = key.split(".")
    assert getattr(getattr(config_of(f"{key}=~/x"), section), name) == "/home/of/them/x"
    assert expanded("a~b/c:d") == Path("a~b/c:d")


def test_dotted_keys_in_a_file_are_told_how_to_nest(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train.steps: 7\n")
    message = message_of(file=file)
    assert "'train: {steps: ...}'" in message and f"{file} line 1" in message
    file.write_text("model: {memory.chunk: 7}\n")
    assert "'memory: {chunk: ...}'" in message_of(file=file)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "[" * 3000, "a: " + "[" * 3000])
def test_what_holds_itself_or_nests_too_deeply_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert str(file) in message_of(file=file)


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "a: b",
        "x # y",
        "null",
        "",
        "{[,]}",
        "'",
        "naïve 😀",
        ["1", "a, b", []],
        {"k 1": {"x": "-"}, "a:b": [{}]},
    ],
    ids=str,
)
def test_a_tree_in_one_line_is_read_as_it_was(value: Any) -> None:
    assert trees.load(trees.dump(value)) == value
    assert "\n" not in trees.dump(value)


def numbers(schema: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """Every key that holds numbers: its name with index 0, int or float, and its field."""
    hints = hints_of(schema)
    for field in dataclasses.fields(schema):
        hint = hints[key_of(field)]
        if type(None) in typing.get_args(hint):
            (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
        item, key = item_of(hint), f"{prefix}{key_of(field)}"
        if "or_list_of" in field.metadata:
            yield key, int, field
        if dataclasses.is_dataclass(item):
            index = "" if item is hint else ".0"
            yield from numbers(typing.cast(type, item), f"{key}{index}.")
        elif item in (int, float) and not issubclass(item, Enum):
            yield key, item, field


@pytest.mark.parametrize("schema", [Config, Cluster, _File], ids=lambda schema: schema.__name__)
def test_every_number_has_a_range(schema: type) -> None:
    found = list(numbers(schema))
    assert len(found) > 0
    for key, _, field in found:
        assert isinstance(field.metadata.get("range"), Range), key


def edges(item: type, wanted: Range) -> tuple[list[float], list[float]]:
    """Numbers on both sides of each end of a range: those that it holds, and those not."""
    step: Any = 1 if item is int else 0.25
    inside: list[float] = []
    outside: list[float] = [2**63] if item is int else [math.inf, -math.inf, math.nan]
    for end, sign in ((wanted.least, 1), (wanted.most, -1)):
        if end is not None:
            inside.append(item(end))
            outside.append(item(end) - sign * step)
    for end, sign in ((wanted.above, 1), (wanted.below, -1)):
        if end is not None:
            outside.append(item(end))
            inside.append(item(end) + sign * step)
    return inside or [item(-3), item(3)], outside


_MIXED = ["data.dir=null", "data.mixture=[{dir: x}]"]
NEEDED = {
    "data.mixture.": _MIXED,
    "data.temperature": _MIXED,
    "data.stages.": ["data.stages=[{from: 50%, sequence_length: 8, mixture: [{dir: x}]}]"],
    "train.global_batch.": ["train.global_batch=[{from: 0, size: 8}]"],
    "hooks.": ["hooks=[{name: replay}]"],
    "model.pattern.": ["model.pattern=[hope]"],
}
"""What a run has to have beside keys that begin so, of which it has none by itself."""


@pytest.mark.parametrize(
    ("key", "item", "field"),
    [pytest.param(*found, id=found[0]) for found in numbers(Config)],
)
def test_the_edges_of_every_range(key: str, item: type, field: dataclasses.Field[Any]) -> None:
    inside, outside = edges(item, field.metadata["range"])

    def override(value: float) -> str:
        number = repr(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
        listed = key in ("parallel.stages", "checkpoint.steps", "hooks.0.steps")
        return f"{key}=[{number}]" if listed else f"{key}={number}"

    entries = [text for begin, given in NEEDED.items() if key.startswith(begin) for text in given]
    for value in inside:
        config_of("levels=[1]", *entries, override(value))
    for value in outside:
        message = message_of("levels=[1]", *entries, override(value))
        assert key in message and "must be" in message, message


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "1e999", "'x'", "null", "[1]"])
@pytest.mark.parametrize("key", ["nodes", "gpus_per_node", "inter_node_gbit", "gpu_memory_gib"])
def test_numbers_of_a_cluster_file(key: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    lines = [f"{key}: {value}" if line.startswith(key) else line for line in CLUSTER.splitlines()]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=key):
        load_cluster(file)


def test_ranges_are_listed_with_the_keys() -> None:
    lines = recipe.describe_keys().splitlines()
    assert any(line.startswith("train.steps (1000; above 0): ") for line in lines)
    assert any(line.startswith("optimizer.beta1 (0.9; at least 0 and below 1): ") for line in lines)

"""The vocabulary: every key is documented and listed."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from nlscale.config import recipe, vocabulary
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.vocabulary import MIXERS, Config, MemoryConfig

SCHEMAS = [
    value
    for _, value in inspect.getmembers(vocabulary, dataclasses.is_dataclass)
    if value.__module__ == vocabulary.__name__
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_is_documented(schema: type) -> None:
    docs = recipe.field_docs(schema)
    for field in dataclasses.fields(schema):
        name = field.name.removesuffix("_")  # behind a keyword of Python
        assert len(docs.get(name, "")) > 8, f"{schema.__name__}.{name}"
        assert docs[name].endswith((".", ")"))
    assert schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}(")


def leaves(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for field, hint in typing.get_type_hints(schema).items():
        name = field.removesuffix("_")
        item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if dataclasses.is_dataclass(item):
            index = ".N" if item is not hint else ""
            keys += leaves(typing.cast(type, item), f"{prefix}{name}{index}.")
        else:
            keys.append(prefix + name)
    return keys


def test_the_list_of_keys_holds_each_key_once_with_default_and_meaning() -> None:
    lines = recipe.describe_keys().splitlines()
    for key in leaves(Config):
        (line,) = [line for line in lines if line.startswith(f"{key} (")]
        assert len(line.partition("): ")[2]) > 8
    assert any(line.startswith("train.steps (1000; above 0): ") for line in lines)
    assert any(line.startswith("data.dir (null): ") for line in lines)
    (mixer,) = [line for line in lines if line.startswith("model.mixer (")]
    assert all(choice in mixer for choice in MIXERS)


def test_every_listed_key_can_be_explained() -> None:
    loaded = recipe.load(None, ["data.mixture=[{dir: x}]"])
    for key in recipe.all_keys():
        text = recipe.explain(loaded, key.replace(".N", ".0"))
        assert len(text.splitlines()) == 4 and text.splitlines()[2].strip(), key


def test_every_mixer_with_a_memory_has_a_whole_preset() -> None:
    open_fields = {f.name for f in dataclasses.fields(MemoryConfig) if f.default is None}
    assert set(MIXER_PRESETS) == set(MIXERS) - {"attention", "sliding-window"}
    for preset in MIXER_PRESETS.values():
        assert set(preset) == open_fields

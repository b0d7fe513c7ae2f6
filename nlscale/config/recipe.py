"""From a recipe and overrides to a checked `Config`, remembering where each value came from.

    text (YAML) + overrides -> tree of what was typed -> checked -> structured Config -> presets

Everything here runs before a process group exists, so that a mistake costs a second.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nlscale.config import (
    curriculum,
    data_sources,
    keys,
    level_optimizer,
    nested,
    pattern,
    periods,
    schema,
    shipped,
    trees,
)
from nlscale.config.extensions import import_all
from nlscale.config.keys import class_doc, field_docs, key_of, to_plain
from nlscale.config.pages import page_of
from nlscale.config.parts import parts_of
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.scalars import NULLS
from nlscale.config.units import declared_period
from nlscale.config.vocabulary import (
    BlockMixerConfig,
    Config,
    LevelConfig,
    LevelsConfig,
    SourceConfig,
)
from nlscale.errors import UserError

_LEVELS = "a list of levels, for example levels=[1,4,16]"
_PATTERN = "a list of mixers, for example model.pattern=[hope,hope,attention]"
_SOURCES = "a list of sources, for example data.mixture=[{dir: data/web, weight: 0.6}]"
RECIPE = schema.Kind(
    name="recipe",
    schema=Config,
    form="a recipe is a mapping such as 'train: {steps: 10}'",
    folder="recipes",
    unset="{0} is not set; give it in the recipe or as {0}=...",
    integer="an integer",
    listing="`nlscale config --keys` lists all keys",
    interpolates=True,
    shapes={
        LevelsConfig: _LEVELS,
        LevelConfig: _LEVELS,
        BlockMixerConfig: _PATTERN,
        SourceConfig: _SOURCES,
    },
)
"""What a recipe has to be."""


@dataclass
class Recipe:
    """A configuration and, for each key that is not a default, where its value came from."""

    config: Config
    sources: dict[str, str]


def load(
    path: str | Path | None, overrides: list[str] | None = None, trusted: bool = False
) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        path: of the recipe, or the name of one that comes with nlscale; None: defaults and
            overrides alone.
        overrides: applied in their order.
        trusted: a person named this recipe, so that the modules of its `run.imports` are imported;
            never for what lies in a run's folder, a checkpoint or an export.

    Raises:
        UserError: missing file, bad YAML, unknown key (naming the nearest), wrong type.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        tree, sources = _read(Path(path))
    _expand_levels(tree, sources)
    pattern.expand(tree, sources)
    for override in overrides or []:
        key, value = _parse_override(override)
        _override(tree, key, value, sources)
        _expand_levels(tree, sources)
        pattern.expand(tree, sources)
    pattern.hand_memory_down(tree, sources)
    if trusted:
        import_all(_imports(tree))
    config = schema.build(tree, RECIPE, sources)
    for index, level in enumerate(config.levels.spectrum):
        declared_period(index, level)
    level_optimizer.settle(config, sources)
    parts_of(config, sources)
    nested.check(config, sources)
    curriculum.curriculum(config, sources)
    periods.check(config, sources)
    data_sources.settle(config, sources)
    _fill_presets(config, sources)
    return Recipe(config, sources)


def _imports(tree: dict[str, Any]) -> list[str]:
    """run.imports, where it is what it should be; what is not is refused with all other keys."""
    run = tree.get("run")
    modules = run.get("imports") if isinstance(run, dict) else None
    return [m for m in modules if isinstance(m, str)] if isinstance(modules, list) else []


def write(config: Config, path: Path, imports: bool = False) -> None:
    """Write the resolved configuration as a recipe that gives the same run again.

    Args:
        config: of the run.
        path: of the file.
        imports: keep `run.imports`. Without it they stand in a comment alone: what lies in a run's
            folder is not to decide what is imported.

    Raises:
        UserError: it cannot be written; what was there stays.
    """
    plain = to_plain(config)
    command = f"nlscale train {path}"
    if not imports:
        command = " ".join([command, *(f"--import {module}" for module in config.run.imports)])
        plain["run"]["imports"] = []
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=False)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(f"# Resolved configuration; `{command}` runs it again.\n{text}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def explain(recipe: Recipe, key: str) -> str:
    """What a key is, where its value came from, what it means, and where to read more.

    A key of a level's own `optimizer` has the value that the level has, which may be the run's.

    Raises:
        UserError: no such key; the nearest one is named.
    """
    value: Any = recipe.config
    meaning, parts, there = "", key.split("."), key
    of_run = _of_run(key)
    for depth, part in enumerate(parts):
        names = {key_of(f): f.name for f in fields(value)} if is_dataclass(value) else {}
        if part in names:
            meaning = field_docs(type(value)).get(part, "")
            value = getattr(value, names[part])
        elif isinstance(value, list) and value:
            index = _index(value, part, key)
            value = value[index]
            if of_run != key:
                value = replace(value, optimizer=level_optimizer.of_level(recipe.config, index))
            meaning = class_doc(type(value))
        elif of_run != key:
            raise UserError(f"{key.removesuffix(f'.{part}')}: {unknown_key(of_run)}")
        elif has_key(key):  # of an entry of a list that is empty, or a number instead
            there, meaning = ".".join(parts[:depth]), keys.meaning_of(Config, key)
            break
        else:
            raise UserError(unknown_key(key))
    where = of_run if there == key else there
    source = recipe.sources.get(where, "the default, nlscale/config/vocabulary.py")
    if of_run != key:
        level_optimizer.refuse_run_wide(key)
        source = recipe.sources.get(key, f"{of_run} of the run: {source}")
    shown = yaml.safe_dump(
        to_plain(value), default_flow_style=True, width=math.inf, sort_keys=False
    )
    shown = shown.strip().removesuffix("\n...")
    unset = "" if there == key else f"{key} is not set: "
    return f"{unset}{there} = {shown}\n  from: {source}\n  {meaning}\n  read: {page_of(of_run)}"


def _of_run(key: str) -> str:
    """Of a key in a level's own `optimizer`, that of the run; else the key itself."""
    return re.sub(r"^levels\.spectrum\.[0-9]+\.(?=optimizer\.)", "", key)


def all_keys() -> list[str]:
    """Every dotted key of a recipe; ``N`` stands for the index into a list."""
    return keys.keys_of(Config)


def has_key(key: str) -> bool:
    """Whether a recipe may hold a dotted key."""
    return keys.has_key(Config, key)


def unknown_key(key: str) -> str:
    """What to say of a dotted key that a recipe may not hold: the nearest that it may."""
    return schema.unknown_key(key, RECIPE)


def describe_keys() -> str:
    """Every key with its default, choices and meaning, one paragraph a section."""
    return keys.describe(Config)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if "=" in str(path) and not path.exists():
        raise UserError(
            f"{str(path)!r} is an override; give the recipe before it: a path, or one of "
            f"{', '.join(shipped.names())}"
        )
    tree, sources = schema.read(path, RECIPE)
    if isinstance(tree.get("levels"), list):  # `_expand_levels` moves it
        for key in [key for key in sources if key.startswith("levels.")]:
            sources[key.replace("levels", "levels.spectrum", 1)] = sources.pop(key)
        sources["levels.spectrum"] = sources["levels"]
    return tree, sources


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"{text!r} is not an override; write key=value, for example train.steps=100"
        )
    key = key.strip()
    if "[" in key:
        raise UserError(unknown_key(key))
    if keys.is_text(Config, key):
        if not value:
            raise UserError(f"{key} is empty; give a text{_or_null(key)}")
        return key, typed_text(value)
    try:
        found = trees.load(value)
        is_period = _long(key) != key and not isinstance(found, dict)
        return key, typed_text(value) if is_period else found
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{text!r}: {value!r} is not a YAML value") from None


def _or_null(key: str) -> str:
    return ", or null" if keys.is_text(Config, key, optional=True) else ""


def typed_text(value: str) -> str | None:
    """A text as it was typed: no type is guessed, and nothing is a comment.

    null is no text, and quotes around the whole, which a shell has left there, are none of it.
    """
    if value in NULLS:
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        try:
            unquoted = trees.load(value)
        except (yaml.YAMLError, ValueError):
            return value
        if isinstance(unquoted, str):
            return unquoted
    return value


def _long(key: str) -> str:
    """Of a level's entry, which may be its period alone, the key of that."""
    return f"{key}.period" if re.fullmatch(r"levels\.spectrum\.[0-9]+", key) else key


def _override(tree: dict[str, Any], key: str, value: Any, sources: dict[str, str]) -> None:
    """Set one key; a mapping sets the keys it holds and leaves the others alone."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _override(tree, f"{key}.{name}", item, sources)
        return
    if key == "levels" and isinstance(value, list):
        key = "levels.spectrum"
    elif key == "run.imports" and isinstance(value, list):
        value = list(dict.fromkeys([*_imports(tree), *value]))  # a command line adds modules
    elif not isinstance(value, dict):
        key = _long(key)
    _set(tree, key.split("."), value, key)
    for old in [k for k in sources if k == key or k.startswith(key + ".")]:
        del sources[old]
    _note(value, key, sources)


def _note(value: Any, key: str, sources: dict[str, str]) -> None:
    sources[key] = "the command line"
    for name, item in value.items() if isinstance(value, dict) else ():
        _note(item, f"{key}.{name}", sources)
    for index, item in enumerate(value) if isinstance(value, list) else ():
        _note(item, f"{key}.{index}", sources)


def _set(tree: Any, parts: list[str], value: Any, key: str) -> None:
    for depth, (part, following) in enumerate(itertools.pairwise(parts), 1):
        if isinstance(tree, list):
            tree = tree[_index(tree, part, key)]
            continue
        if not isinstance(tree.get(part), dict | list):
            tree[part] = {}
        tree = tree[part]
        if isinstance(tree, dict) and re.fullmatch("[0-9]+", following):
            if parts[:depth] == ["levels", "spectrum"]:
                raise UserError(f"{key}: the recipe lists no levels; first give levels=[1,4,16]")
            if has_key(key):
                whole = ".".join(parts[:depth])
                raise UserError(f"{key}: the recipe has no list there; first give {whole}=[...]")
            raise UserError(unknown_key(key))
    if isinstance(tree, list):
        tree[_index(tree, parts[-1], key)] = value
    else:
        tree[parts[-1]] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(items):
        last = f"; use 0 to {len(items) - 1}" if items else ""
        raise UserError(f"{key}: {part!r} is not an index into a list of {len(items)}{last}")
    return int(part)


def _expand_levels(tree: dict[str, Any], sources: dict[str, str]) -> None:
    """`levels: [1, 4, 16]` and `levels: [{name: ...}]` are short for `levels.spectrum`."""
    levels = tree.get("levels")
    if isinstance(levels, list):
        levels = tree["levels"] = {"spectrum": levels}
    spectrum = levels.get("spectrum") if isinstance(levels, dict) else None
    if not isinstance(spectrum, list):
        return
    for i, entry in enumerate(spectrum):
        key = f"levels.spectrum.{i}"
        if not isinstance(entry, dict):
            entry = spectrum[i] = {"period": entry}
            sources[f"{key}.period"] = sources.get(key, "")
        if "name" not in entry:
            entry["name"] = f"level{i}"
            sources[f"{key}.name"] = "its place in levels.spectrum"


def _fill_presets(config: Config, sources: dict[str, str]) -> None:
    """Of every memory that there is: `model.memory` itself where there is no pattern."""
    model = config.model
    given: dict[str, Any] = {f"model.pattern.{i}": x for i, x in enumerate(model.pattern)}
    for key, own in (given or {"model": model}).items():
        for name, value in MIXER_PRESETS.get(own.mixer, {}).items():
            if getattr(own.memory, name) is None:
                setattr(own.memory, name, value)
                sources[f"{key}.memory.{name}"] = f"the preset of {key}.mixer={own.mixer}"

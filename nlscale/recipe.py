"""From a recipe and overrides to a checked `Config`, remembering where each value came from.

    text (YAML) + overrides -> plain tree -> keys checked -> structured Config -> sizes checked

Everything here runs before a process group exists, so that a mistake costs a second.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import typing
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlscale import config as vocabulary
from nlscale.config import MIXER_PRESETS, Config, Mixer
from nlscale.errors import UserError


@dataclass
class Recipe:
    """A configuration and, for each key that is not a default, where its value came from."""

    config: Config
    sources: dict[str, str]


def load(path: str | Path | None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Raises:
        UserError: missing file, bad YAML, unknown key (naming the nearest), wrong type.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        tree, sources = _read(Path(path))
    for override in overrides or []:
        key, value = _parse_override(override)
        _set(tree, key.split("."), value, key)
        sources = {k: v for k, v in sources.items() if k != key and not k.startswith(key + ".")}
        sources[key] = "the command line"
    _expand_levels(tree)
    _check_keys(tree, Config, "", sources)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(tree))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, tree, sources)) from None
    assert isinstance(config, Config)
    _fill_presets(config, sources)
    return Recipe(config, sources)


def to_plain(value: Any) -> Any:
    """A configuration as plain dicts, lists and scalars, enums by value, for YAML and JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def write(config: Config, path: Path) -> None:
    """Write the resolved configuration as a recipe that gives the same run again."""
    text = yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=False)
    path.write_text(f"# Resolved configuration; `nlscale train {path}` runs it again.\n{text}")


def explain(recipe: Recipe, key: str) -> str:
    """What a key is, what it means, and where its value came from.

    Raises:
        UserError: no such key; the nearest one is named.
    """
    value: Any = recipe.config
    meaning = ""
    for part in key.split("."):
        if is_dataclass(value) and part in {f.name for f in fields(value)}:
            meaning = field_docs(type(value)).get(part, "")
            value = getattr(value, part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise UserError(_unknown(key, key))
    source = next(
        (
            recipe.sources[prefix]
            for prefix in _prefixes(key)
            if prefix in recipe.sources
        ),
        None,
    )
    shown = yaml.safe_dump(to_plain(value), default_flow_style=True).strip().removesuffix("\n...")
    return f"{key} = {shown}\n  from: {source or 'the default, nlscale/config.py'}\n  {meaning}"


def all_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the vocabulary, list entries written as ``[i]``."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        keys.append(prefix + name)
        if is_dataclass(hint):
            keys += all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        elif typing.get_origin(hint) is list and is_dataclass(typing.get_args(hint)[0]):
            keys += all_keys(typing.get_args(hint)[0], f"{prefix}{name}[i].")
    return keys


def describe_keys() -> str:
    """Every key with its meaning, one paragraph a section."""
    lines: list[str] = []

    def walk(schema: type, prefix: str) -> None:
        docs = field_docs(schema)
        for name, hint in typing.get_type_hints(schema).items():
            item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
            if is_dataclass(item):
                suffix = "[i]." if item is not hint else "."
                lines.append("" if not prefix else f"{prefix}{name}: {docs.get(name, '')}")
                walk(typing.cast(type, item), f"{prefix}{name}{suffix}")
            else:
                choices = ""
                if isinstance(hint, type) and issubclass(hint, Enum):
                    choices = f" ({', '.join(member.value for member in hint)})"
                lines.append(f"{prefix}{name}{choices}: {docs.get(name, '')}")

    walk(Config, "")
    return "\n".join(lines).strip()


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a configuration class, on one line."""
    module = ast.parse(inspect.getsource(vocabulary))
    body = next(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == schema.__name__)
    docs: dict[str, str] = {}
    for node, following in zip(body, body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        here = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = f"; there are {', '.join(here)}" if here else ""
        raise UserError(f"no recipe at {path}{hint}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        root = yaml.compose(path.read_text())
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: it must be a mapping such as 'train: {{steps: 10}}'")
    sources: dict[str, str] = {}
    _locate(root, "", str(path), sources)
    return typing.cast(dict[str, Any], tree), sources


def _locate(node: Any, key: str, path: str, sources: dict[str, str]) -> None:
    if key == "levels" and isinstance(node, yaml.SequenceNode):
        key = "levels.spectrum"  # `_expand_levels` moves a plain list there
    if key:
        sources[key] = f"{path} line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            _locate(child, f"{key}.{name.value}" if key else str(name.value), path, sources)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _locate(child, f"{key}.{index}", path, sources)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} is not an override; write key=value, for example train.steps=100")
    try:
        # OmegaConf's YAML reads 1e-3 as a number, which plain YAML does not.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"{text!r}: {value!r} is not a YAML value") from None
    return key.strip(), typing.cast(dict[str, Any], parsed)["value"]


def _set(tree: Any, parts: list[str], value: Any, key: str) -> None:
    if parts[0] == "levels" and isinstance(tree, dict):
        _expand_levels(tree)
    for part, following in zip(parts, parts[1:], strict=False):
        if isinstance(tree, list):
            tree = tree[_index(tree, part, key)]
        else:
            if not isinstance(tree.get(part), dict | list):
                tree[part] = {}
            tree = tree[part]
            if isinstance(tree, dict) and following.isdigit():
                raise UserError(f"{key}: the recipe has no list {key.rsplit(f'.{following}', 1)[0]}")
    if isinstance(tree, list):
        tree[_index(tree, parts[-1], key)] = value
    else:
        tree[parts[-1]] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"{key}: {part!r} is not an index into a list of {len(items)}")
    return int(part)


def _expand_levels(tree: dict[str, Any]) -> None:
    """`levels: [1, 4, 16]` and `levels: [{name: ...}]` are short for `levels.spectrum`."""
    levels = tree.get("levels")
    if isinstance(levels, list):
        levels = tree["levels"] = {"spectrum": levels}
    spectrum = levels.get("spectrum") if isinstance(levels, dict) else None
    if not isinstance(spectrum, list):
        return
    for i, entry in enumerate(spectrum):
        if not isinstance(entry, dict):
            entry = spectrum[i] = {"period": entry}
        entry.setdefault("name", f"level{i}")
        if "period" in entry:
            entry["period"] = str(entry["period"])


def _check_keys(tree: Any, schema: type, prefix: str, sources: dict[str, str]) -> None:
    hints = typing.get_type_hints(schema)
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')} holds several keys, it cannot be {tree!r}")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            where = sources.get(key, "")
            raise UserError(_unknown(key, str(name), where))
        hint = hints[name]
        if is_dataclass(hint):
            _check_keys(value, typing.cast(type, hint), f"{key}.", sources)
        elif typing.get_origin(hint) is list and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(item, typing.get_args(hint)[0], f"{key}.{index}.", sources)
        elif isinstance(hint, type) and issubclass(hint, Enum):
            choices = [member.value for member in hint]
            if value not in choices:
                raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")
            tree[name] = hint(value)


def _unknown(key: str, name: str, where: str = "") -> str:
    known = all_keys()
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(re.sub(r"\.(\d+)", "[i]", key), known, 1, 0.75)
    near = near or [by_last[n] for n in difflib.get_close_matches(name, by_last, 1, 0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else "; `nlscale config --keys` lists all keys"
    return f"unknown key {key!r}{f' ({where})' if where else ''}{hint}"


def _one_line(error: OmegaConfBaseException, tree: Any, sources: dict[str, str]) -> str:
    key = str(getattr(error, "full_key", "") or "").replace("[", ".").replace("]", "")
    message = str(error).strip().splitlines()[0]
    missing = re.search(r"type `(\w+)` has missing mandatory value: (\w+)", message)
    if missing:  # OmegaConf names the class and the field, not the whole key
        key = key or next(k for k in all_keys() if k.endswith(f".{missing[2]}"))
        return f"{key} is not set; give it in the recipe or as {key}=..."
    where = f" ({sources[key]})" if key in sources else ""
    kind = re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message)
    if kind:
        names = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        message = f"{kind[1]!r} is not {names.get(kind[2], kind[2])}"
    return f"{key}: {message}{where}"


def _fill_presets(config: Config, sources: dict[str, str]) -> None:
    memory = config.model.memory
    if config.model.mixer == Mixer.attention:
        return
    for name, value in MIXER_PRESETS[config.model.mixer].items():
        if getattr(memory, name) is None:
            setattr(memory, name, value)
            sources[f"model.memory.{name}"] = f"the preset of model.mixer={config.model.mixer.value}"


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]



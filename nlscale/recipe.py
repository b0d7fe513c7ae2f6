"""From a recipe and overrides to a checked `Config`, remembering where each value came from.

    text (YAML) + overrides -> plain tree -> keys checked -> structured Config -> sizes checked

Everything here runs before a process group exists, so that a mistake costs a second.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import re
import typing
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlscale import config as vocabulary
from nlscale.config import MIXER_PRESETS, Config, LevelsConfig, Mixer
from nlscale.errors import UserError
from nlscale.levels import declared_period

_LEVELS = "a list of levels, for example levels=[1,4,16]"
_MAPPING = "a recipe is a mapping such as 'train: {steps: 10}'"


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
    _expand_levels(tree, sources)
    for override in overrides or []:
        key, value = _parse_override(override)
        _override(tree, key, value, sources)
        _expand_levels(tree, sources)
    _check_keys(tree, Config, "", sources)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(tree))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, "", sources)) from None
    assert isinstance(config, Config)
    for index, level in enumerate(config.levels.spectrum):
        declared_period(index, level)
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
        elif isinstance(value, list):
            value = value[_index(value, part, key)]
            meaning = _class_doc(type(value))
        else:
            raise UserError(_unknown(key, key))
    source = recipe.sources.get(key, "the default, nlscale/config.py")
    shown = yaml.safe_dump(
        to_plain(value), default_flow_style=True, width=math.inf, sort_keys=False
    )
    shown = shown.strip().removesuffix("\n...")
    return f"{key} = {shown}\n  from: {source}\n  {meaning}"


def all_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the vocabulary; ``N`` stands for the index into a list."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        keys.append(prefix + name)
        if is_dataclass(hint):
            keys += all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        elif typing.get_origin(hint) is list and is_dataclass(typing.get_args(hint)[0]):
            keys += all_keys(typing.get_args(hint)[0], f"{prefix}{name}.N.")
    return keys


def describe_keys() -> str:
    """Every key with its default, choices and meaning, one paragraph a section."""
    lines: list[str] = []

    def walk(schema: type, prefix: str) -> None:
        docs = field_docs(schema)
        hints = typing.get_type_hints(schema)
        for f in fields(schema):
            name, hint = f.name, hints[f.name]
            item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
            if is_dataclass(item):
                lines.extend([""] * (not prefix) + [f"{prefix}{name}: {docs[name]}"])
                walk(typing.cast(type, item), f"{prefix}{name}{'.N' * (item is not hint)}.")
                continue
            value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            default = "required" if value == MISSING else yaml.safe_dump(to_plain(value))
            notes = [default.strip().removesuffix("\n...")]
            if isinstance(item, type) and issubclass(item, Enum):
                notes.append("of " + ", ".join(member.value for member in item))
            lines.append(f"{prefix}{name} ({'; '.join(notes)}): {docs[name]}")

    walk(Config, "")
    return "\n".join(lines).strip()


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a configuration class, on one line.

    A field that is a section needs none: it has that of its class.
    """
    module = ast.parse(inspect.getsource(vocabulary))
    body = next(
        n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == schema.__name__
    )
    docs = {
        name: _class_doc(typing.cast(type, hint))
        for name, hint in typing.get_type_hints(schema).items()
        if is_dataclass(hint)
    }
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def _class_doc(schema: type) -> str:
    return (inspect.getdoc(schema) or "").partition("\n\n")[0].replace("\n", " ")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        here = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = f"; there are {', '.join(here)}" if here else ""
        if "=" in str(path):
            raise UserError(f"{str(path)!r} is an override; give the recipe before it{hint}")
        raise UserError(f"no recipe at {path}{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        # OmegaConf would take a lone word for a key.
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} is not a recipe: {_MAPPING}")
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem}; {_MAPPING}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    sources: dict[str, str] = {}
    if root is not None:
        _locate(root, "", str(path), sources)
    return typing.cast(dict[str, Any], tree), sources


def _locate(node: Any, key: str, path: str, sources: dict[str, str]) -> None:
    where = f"{path} line {node.start_mark.line + 1}"
    if key:
        sources[key] = where
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            _locate(child, f"{key}.{name.value}" if key else str(name.value), path, sources)
    elif isinstance(node, yaml.SequenceNode):
        if key == "levels":  # `_expand_levels` moves a plain list there
            key = "levels.spectrum"
            sources[key] = where
        for index, child in enumerate(node.value):
            _locate(child, f"{key}.{index}", path, sources)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"{text!r} is not an override; write key=value, for example train.steps=100"
        )
    try:
        if "[" in key:
            raise UserError(_unknown(key, key))
        # OmegaConf's YAML reads 1e-3 as a number, which plain YAML does not.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"{text!r}: {value!r} is not a YAML value") from None
    return key.strip(), typing.cast(dict[str, Any], parsed)["value"]


def _override(tree: dict[str, Any], key: str, value: Any, sources: dict[str, str]) -> None:
    """Set one key; a mapping sets the keys it holds and leaves the others alone."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _override(tree, f"{key}.{name}", item, sources)
        return
    if key == "levels" and isinstance(value, list):
        key = "levels.spectrum"
    elif re.fullmatch(r"levels\.spectrum\.\d+", key):
        key += ".period"
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
        if isinstance(tree, dict) and following.isdigit():
            if parts[:depth] == ["levels", "spectrum"]:
                raise UserError(f"{key}: the recipe lists no levels; first give levels=[1,4,16]")
            raise UserError(_unknown(key, parts[-1]))
    if isinstance(tree, list):
        tree[_index(tree, parts[-1], key)] = value
    else:
        tree[parts[-1]] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
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
        if isinstance(entry.get("period"), int):
            entry["period"] = str(entry["period"])


def _check_keys(tree: Any, schema: type, prefix: str, sources: dict[str, str]) -> None:
    hints = typing.get_type_hints(schema)
    if not isinstance(tree, dict):
        key = prefix.rstrip(".")
        shown = "empty" if tree is None else repr(tree)
        right = f"a section of keys such as {prefix}{next(iter(hints))}"
        raise UserError(
            f"{key} is {shown}{_where(key, sources)}; it must be "
            f"{_LEVELS if schema is LevelsConfig else right}"
        )
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(_unknown(key, str(name), sources))
        tree[name] = _checked(value, hints[name], key, sources)


def _checked(value: Any, hint: Any, key: str, sources: dict[str, str]) -> Any:
    """The value of a key; sections and lists are checked all the way down."""
    if type(None) in typing.get_args(hint):
        if value is None:
            return None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if is_dataclass(hint):
        _check_keys(value, typing.cast(type, hint), f"{key}.", sources)
    elif isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.value for member in hint]
        if value not in choices:
            shown = "null" if value is None else repr(value)
            raise UserError(
                f"{key}: {shown} is not one of {', '.join(choices)}{_where(key, sources)}"
            )
        return hint(value)
    elif typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list):
            shown = "empty" if value is None else repr(value)
            right = _LEVELS if is_dataclass(item) else f"a list such as [{value or ''}]"
            raise UserError(f"{key} is {shown}{_where(key, sources)}; it must be {right}")
        if is_dataclass(item):
            _check_entries(value, typing.cast(type, item), key, sources)
        else:
            return [_checked(v, item, f"{key}.{i}", sources) for i, v in enumerate(value)]
    return value


def _check_entries(items: list[Any], schema: type, key: str, sources: dict[str, str]) -> None:
    for index, item in enumerate(items):
        _check_keys(item, schema, f"{key}.{index}.", sources)
        try:  # by itself, because OmegaConf's errors do not say which entry they are about
            OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(item))
        except OmegaConfBaseException as error:
            raise UserError(_one_line(error, f"{key}.{index}.", sources)) from None


def _unknown(key: str, name: str, sources: dict[str, str] | None = None) -> str:
    known = all_keys()
    plain = re.sub(r"[.\[](\d+)\]?", ".N", key)
    near = difflib.get_close_matches(plain, known, 1, 0.75)
    if not near:  # the right name in the wrong section
        last = difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in known], 1, 0.6)
        same = [k for k in known if last and k.rsplit(".", 1)[-1] == last[0]]
        near = difflib.get_close_matches(plain, same, 1, 0.0)
    index = re.search(r"\d+", key)
    guess = near[0].replace(".N", f".{index[0]}" if index else ".0") if near else ""
    hint = f"did you mean {guess!r}?" if near else "`nlscale config --keys` lists all keys"
    return f"unknown key {key!r}{_where(key, sources or {})}; {hint}"


def _where(key: str, sources: dict[str, str]) -> str:
    return f" ({sources[key]})" if sources.get(key) else ""


_KINDS = {
    "int": "an integer",
    "Integer": "an integer",
    "float": "a number",
    "Float": "a number",
    "bool": "true or false",
    "Boolean": "true or false",
    "str": "a text",
    "string": "a text",
}


def _one_line(error: OmegaConfBaseException, prefix: str, sources: dict[str, str]) -> str:
    """What OmegaConf says of a wrong value, in the words of a recipe."""
    key = prefix + str(getattr(error, "full_key", "") or "").replace("[", ".").replace("]", "")
    message = str(error).strip().splitlines()[0]
    missing = re.search(r"type `(\w+)` has missing mandatory value: (\w+)", message)
    if missing:  # OmegaConf names the class and the field, not the whole key
        key = key or next(k for k in all_keys() if k.endswith(f".{missing[2]}"))
        return f"{key} is not set; give it in the recipe or as {key}=..."
    for pattern in (
        r"Value '(?P<value>.*)' of type '.*' could not be converted to (?P<kind>\w+)",
        r"Value '(?P<value>.*)' is not a valid (?P<kind>\w+)",
        r"Cannot convert '\w+' to (?P<kind>\w+): '(?P<value>.*)'",
        r"Incompatible value '(?P<value>None)' for field of type '(?P<kind>\w+)'",
    ):
        match = re.search(pattern, message)
        if match:
            value, kind = match["value"], match["kind"]
            shown = "null" if value == "None" else repr(value)
            message = f"{shown} is not {_KINDS.get(kind, kind)}"
            if kind == "Integer" and re.fullmatch(r"-?\d+\.0", value):
                message += f"; write {value.removesuffix('.0')}"
            if kind == "string":
                message += "; put it in quotes"
            break
    return f"{key}: {message}{_where(key, sources)}"


def _fill_presets(config: Config, sources: dict[str, str]) -> None:
    memory = config.model.memory
    if config.model.mixer == Mixer.attention:
        return
    for name, value in MIXER_PRESETS[config.model.mixer].items():
        if getattr(memory, name) is None:
            setattr(memory, name, value)
            preset = f"the preset of model.mixer={config.model.mixer.value}"
            sources[f"model.memory.{name}"] = preset

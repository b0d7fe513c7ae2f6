"""What a configuration class holds: its keys, their choices and meaning, and its plain values.

All of it is read off the class: the fields, their types, and the text under each field.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import yaml
from omegaconf import MISSING


def to_plain(value: Any) -> Any:
    """A configuration as plain dicts, lists and scalars, enums by value, for YAML and JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key_of(f): to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def key_of(f: dataclasses.Field[Any]) -> str:
    """The key of a field: its name, but for the underscore behind a keyword of Python (PEP 8)."""
    return f.name.removesuffix("_")


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """The type of each key of a class, read once; of a number that may be a list of sections, that
    list's."""
    hints = typing.get_type_hints(schema)
    return {
        key_of(f): types.GenericAlias(list, f.metadata["or_list_of"])
        if "or_list_of" in f.metadata
        else hints[f.name]
        for f in fields(schema)
    }


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a class; ``N`` stands for the index into a list."""
    keys: list[str] = []
    for name, hint in hints_of(schema).items():
        keys.append(prefix + name)
        item = item_of(hint)
        if is_dataclass(item):
            index = "" if item is hint else ".N"
            keys += keys_of(typing.cast(type, item), f"{prefix}{name}{index}.")
    return keys


def has_key(schema: type, key: str) -> bool:
    """Whether a class has a dotted key; it may hold indices into lists."""
    return re.sub(r"\.[0-9]+", ".N", key) in keys_of(schema)


def is_text(schema: type, key: str, optional: bool = False) -> bool:
    """Whether a dotted key of a class holds a text, or, `optional`, a text or null.

    The key may hold indices into lists.
    """
    hint: Any = schema
    for part in re.sub(r"\.[0-9]+", "", key).split("."):
        item = item_of(hint)
        hint = hints_of(typing.cast(type, item)).get(part) if is_dataclass(item) else None
    may_be_null = str in typing.get_args(hint) and type(None) in typing.get_args(hint)
    return may_be_null or (hint is str and not optional)


def meaning_of(schema: type, key: str) -> str:
    """The docstring of a dotted key of a class, which may hold indices into lists."""
    *sections, last = re.sub(r"\.[0-9]+", "", key).split(".")
    for name in sections:
        schema = item_of(hints_of(schema)[name])
    return field_docs(schema)[last]


def item_of(hint: Any) -> Any:
    """The type of an entry where the type is a list, else the type itself."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def choices_of(hint: Any, f: dataclasses.Field[Any]) -> list[str]:
    """The values that a field of a type may have, where they are listed: by it, or by name."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return f.metadata.get("names", [])


def describe(schema: type, prefix: str = "") -> str:
    """Every key with its default, choices and meaning, one paragraph a section."""
    lines: list[str] = []
    docs, hints = field_docs(schema), hints_of(schema)
    for f in fields(schema):
        name = key_of(f)
        hint = hints[name]
        item = item_of(hint)
        key = f"{prefix}{name}"
        if is_dataclass(item):
            default = f" ({_default_of(f, int)})" if "or_list_of" in f.metadata else ""
            lines += [""] * (not prefix) + [f"{key}{default}: {docs[name]}"]
            lines.append(describe(typing.cast(type, item), f"{key}{'.N' * (item is not hint)}."))
        else:
            lines.append(f"{key} ({_default_of(f, item)}): {docs[name]}")
    return "\n".join(lines).strip()


def _default_of(f: dataclasses.Field[Any], item: Any) -> str:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    default = "required" if value == MISSING else yaml.safe_dump(to_plain(value))
    notes = [default.strip().removesuffix("\n...")]
    if choices := choices_of(item, f):
        notes.append("of " + ", ".join(choices))
    if "range" in f.metadata:
        notes.append(str(f.metadata["range"]))
    return "; ".join(notes)


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a configuration class, on one line, by its key.

    A field that is a section needs none: it has that of its class.
    """
    docs = {
        name: class_doc(typing.cast(type, hint))
        for name, hint in hints_of(schema).items()
        if is_dataclass(hint)
    }
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    for node, following in itertools.pairwise(definition.body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id.removesuffix("_")] = " ".join(str(following.value.value).split())
    return docs


def class_doc(schema: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return (inspect.getdoc(schema) or "").partition("\n\n")[0].replace("\n", " ")

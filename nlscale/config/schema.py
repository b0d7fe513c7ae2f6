"""From a YAML file to a dataclass, and what to say where it is not one.

    text -> tree of what was typed, with the line of each key
    -> held against the dataclass, whose types say what the characters mean -> the dataclass
    -> ranges and paths

Recipes, cluster files and sweep files are read and checked here; a `Kind` says what is particular
to each. Every mistake is one line that names the key, the file and line, and the fix.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from nlscale.config import scalars, shipped, trees
from nlscale.config.fields import Range, expanded
from nlscale.config.keys import choices_of, has_key, hints_of, item_of, key_of, keys_of
from nlscale.config.scalars import Plain, shown
from nlscale.config.urls import is_url, wrong_with
from nlscale.errors import UserError

Made = TypeVar("Made")
_ANY_NUMBER = Range()


@dataclass(frozen=True)
class Kind(Generic[Made]):
    """A kind of file: the dataclass it becomes, and the words of its errors."""

    name: str
    """Such as 'recipe'."""
    schema: type[Made]
    """What it holds."""
    form: str
    """What its text has to be, as a sentence: 'a recipe is a mapping such as ...'."""
    folder: str
    """Where those that come with nlscale lie, such as recipes/clusters."""
    unset: str
    """What is said of keys that are required and not there; ``{}`` stands for them."""
    integer: str = "a whole number"
    """What an int is called."""
    listing: str = ""
    """What lists all keys, which an unknown one is then compared with; empty: it is compared with
    those of its section."""
    interpolates: bool = False
    """${key} stands for the value of another key; elsewhere it is text like any other."""
    shapes: Mapping[type, str] = field(default_factory=dict)
    """What a section of a class, or a list of them, is to be, where keys alone do not say it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say after a name that is none of the known: the nearest of them, or all."""
    known = list(known)
    return _close(name, known) or f"there are {', '.join(known)}"


def _close(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def read(given: str | Path, kind: Kind[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree that a file holds, and for each dotted key its file and line.

    The file alone stands under the empty key. Scalars are what was typed (`nlscale.config.trees`).

    Args:
        given: path of the file, or the name of one that comes with nlscale.
        kind: of file.

    Raises:
        UserError: no such file (naming those that there are), not YAML, no mapping.
    """
    try:
        path = shipped.find(expanded(given), kind.folder)
    except (ValueError, OSError) as error:
        raise UserError(f"{kind.name} {str(given)!r} {error}") from None
    try:
        if path.is_dir() or not path.exists():
            raise UserError(f"no {kind.name} at {path}; {others(path, kind)}")
        text = path.read_text(encoding="utf-8")
        root = trees.compose(text)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} is not a {kind.name}: {kind.form}")
        tree = trees.load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem}; {kind.form}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not a {kind.name}: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    sources = {"": str(path)}
    if root is not None:
        _locate(root, "", str(path), sources)
    return typing.cast(dict[str, Any], tree), sources


def others(path: Path, kind: Kind[Any]) -> str:
    """What to say where there is no file: the name that is nearest to it, or all names."""
    known = shipped.names(kind.folder)
    inside = shipped.beside(path, kind.folder)
    for name in (path.name.removesuffix(path.suffix), path.name):
        if near := difflib.get_close_matches(name, inside, 1, 0.5):
            return f"did you mean '{path.parent.name}/{near[0]}'?"
        if not inside and (said := _close(name, known)):
            return said
    listed = [f"{path.parent.name}/{name}" for name in inside] or known
    return f"give a path, or one of {', '.join(listed)}"


def _locate(node: Any, key: str, path: str, sources: dict[str, str]) -> None:
    if key:
        sources[key] = f"{path} line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            _locate(child, f"{key}.{name.value}" if key else str(name.value), path, sources)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _locate(child, f"{key}.{index}", path, sources)


def where(key: str, sources: Mapping[str, str]) -> str:
    """Where a key was read, in brackets, as errors end; nothing if it is not known."""
    at = sources.get(key)
    return f" ({at})" if at else ""


def check(tree: Any, kind: Kind[Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """A tree whose keys and values are those of the kind's dataclass, choices by their member.

    Raises:
        UserError: an unknown key (naming the nearest), a section or list that is none, a value of
            a wrong type or none of the choices, a required key that is not there.
    """
    return _Checker(kind, sources).whole(tree)


def build(tree: Any, kind: Kind[Made], sources: Mapping[str, str]) -> Made:
    """The dataclass of a kind, made of a tree; interpolations are resolved, paths expanded.

    Raises:
        UserError: see `check`; an interpolation of what is not there, or of a wrong type; a number
            out of its range; a path that is none; a text that is not Unicode.
    """
    checker = _Checker(kind, sources)
    checked = checker.whole(tree)
    if checker.refers:
        try:
            merged = OmegaConf.merge(
                structured(typing.cast(type, kind.schema)), OmegaConf.create(checked)
            )
            made = typing.cast(Made, OmegaConf.to_object(merged))
        except OmegaConfBaseException as error:
            raise UserError(checker.explained(error)) from None
        except RecursionError:
            raise UserError(f"{sources.get('', kind.name)}: interpolations of each other") from None
    else:
        made = _make(checked, kind.schema)
    settle(made, sources)
    return made


@functools.cache
def structured(schema: type) -> Any:
    """What OmegaConf makes of a dataclass: much of the time of a recipe, so it is made once.

    It is merged into, which copies it, and never changed.
    """
    return OmegaConf.structured(schema)


def settle(made: Any, sources: Mapping[str, str], prefix: str = "") -> None:
    """Check the ranges of a dataclass's fields, and expand their paths, all the way down.

    Raises:
        UserError: see `build`.
    """
    for f in fields(made):
        key, value = f"{prefix}{key_of(f)}", getattr(made, f.name)
        try:
            if "or_list_of" in f.metadata and (
                isinstance(value, bool) or not isinstance(value, int | list)
            ):  # an interpolation
                raise ValueError(f"is {value!r}; it must be a whole number or a list of sections")
            setattr(made, f.name, _settled(value, f, f"{key}.", sources))
        except ValueError as error:
            raise UserError(f"{key} {error}{where(key, sources)}") from None


def _settled(value: Any, f: Field[Any], prefix: str, sources: Mapping[str, str]) -> Any:
    if is_dataclass(value):
        settle(value, sources, prefix)
    elif isinstance(value, list):
        return [_settled(item, f, f"{prefix}{i}.", sources) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        return {name: _settled(item, f, prefix, sources) for name, item in value.items()}
    elif isinstance(value, str) and not isinstance(value, Enum):
        return _settled_text(value, f)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        wanted = f.metadata.get("range", _ANY_NUMBER)
        if not wanted.holds(value):
            raise ValueError(f"is {value}; it must be {wanted.without(value)}")
    return value


def _settled_text(value: str, f: Field[Any]) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is {value!a}, which is not UTF-8") from None
    if "\0" in value:
        raise ValueError(f"is {value!r}; a text holds no zero byte")
    if not f.metadata.get("path"):
        return value
    if f.metadata.get("url") and is_url(value):
        if (wrong := wrong_with(value, "s3://bucket/data")) is not None:
            raise ValueError(wrong)
        return value.rstrip("/")
    try:
        return str(expanded(value))
    except ValueError as error:
        raise ValueError(f"{value!r} {error}") from None


def _make(checked: Mapping[str, Any], schema: type[Made]) -> Made:
    """The dataclass of checked values, as they are."""
    hints = hints_of(typing.cast(type, schema))
    given = [f for f in fields(typing.cast(Any, schema)) if f.name in checked]
    return schema(**{f.name: _made(checked[f.name], hints[key_of(f)]) for f in given})


def _made(value: Any, hint: Any) -> Any:
    """A checked value of a type, with the dataclasses that are in it."""
    if isinstance(value, list):
        return [_made(each, item_of(hint)) for each in value]
    if not isinstance(value, dict):
        return value
    if typing.get_origin(hint) is dict:
        return {name: _made(each, typing.get_args(hint)[1]) for name, each in value.items()}
    if type(None) in typing.get_args(hint):
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    return _make(value, typing.cast(type, hint)) if is_dataclass(hint) else value


def _refers(tree: Any) -> bool:
    """Whether a text of a tree refers to another key: ${key}."""
    if isinstance(tree, dict):
        return any(map(_refers, tree.values()))
    if isinstance(tree, list):
        return any(map(_refers, tree))
    return isinstance(tree, str) and "${" in tree


def unknown_key(key: str, kind: Kind[Any]) -> str:
    """What to say of a dotted key that is none of a kind's: the nearest of all, or their list."""
    guess = _guess(key, keys_of(kind.schema))
    return f"unknown key {key!r}; {f'did you mean {guess!r}?' if guess else kind.listing}"


def unknown_name(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What to say of a name in a section that holds others: the nearest of them, or all."""
    guess = _close(name, known) or f"the keys are {', '.join(known)}"
    return f"unknown key {prefix + name!r}; {guess}"


def nested(first: str, rest: str) -> str:
    """A dotted key as a file has it: `train: {steps: ...}`."""
    for name in reversed(rest.split(".")):
        rest = f"{{{name}: {rest if rest.startswith('{') else '...'}}}"
    return f"'{first}: {rest}'"


def _guess(key: str, known: list[str]) -> str | None:
    """The key that was meant, if one is near: in the same section, or of that name in another."""
    plain = re.sub(r"[.\[](\d+)\]?", ".N", key)
    near = difflib.get_close_matches(plain, known, 1, 0.75)
    if not near:
        names = [k.rpartition(".")[2] for k in known]
        last = difflib.get_close_matches(key.rpartition(".")[2], names, 1, 0.6)
        same = [k for k, name in zip(known, names, strict=True) if name in last]
        near = difflib.get_close_matches(plain, same, 1, 0.0)
    index = re.search(r"\d+", key)
    return near[0].replace(".N", f".{index[0]}" if index else ".0") if near else None


def _texts(value: Any) -> Any:
    """What was typed as texts, all the way down."""
    if isinstance(value, dict):
        return {str(name): _texts(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return str(value) if isinstance(value, Plain) else value


class _Checker:
    """Holds a tree against a dataclass, all the way down."""

    def __init__(self, kind: Kind[Any], sources: Mapping[str, str]) -> None:
        self._kind, self._sources = kind, sources
        self.refers = False
        """Whether a value of the tree refers to another, which OmegaConf resolves."""
        self._unset: list[str] = []
        self._scalars: dict[str, tuple[Any, type]] = {}

    def whole(self, tree: Any) -> dict[str, Any]:
        """The checked values of a tree."""
        self.refers = self._kind.interpolates and _refers(tree)
        checked = self._section(tree, self._kind.schema, "")
        if self._unset:
            self._refuse("", self._kind.unset.format(", ".join(self._unset)))
        return checked

    def explained(self, error: OmegaConfBaseException) -> str:
        """What OmegaConf says of an interpolation, in the words of the file."""
        name = str(getattr(error, "full_key", "") or "").replace("[", ".").replace("]", "")
        key = ".".join(part.removesuffix("_") for part in name.split("."))
        message = f"{key}: {str(error).strip().splitlines()[0]}"
        if isinstance(error, ValidationError) and key in self._scalars:
            value, hint = self._scalars[key]
            message = self._wrong(key, value, hint, "")
        return f"{message}{where(key, self._sources)}"

    def _section(self, tree: Any, schema: type, prefix: str) -> dict[str, Any]:
        hints = hints_of(schema)
        if not isinstance(tree, dict):
            keys = f"a section of keys such as {prefix}{next(iter(hints))}"
            self._misshapen(prefix.rstrip("."), tree, self._kind.shapes.get(schema, keys))
        for name in tree:
            if name not in hints:
                self._unknown(str(name), hints, prefix)
        checked = {}
        for f in fields(schema):
            name = key_of(f)
            value, key = tree.get(name, MISSING), f"{prefix}{name}"
            if value == MISSING and name in tree and not isinstance(value, Plain):
                self._refuse(key, f"{key}: '???' stands for what is not set; give a value")
            if f.default == MISSING and value in (MISSING, None):
                self._unset.append(key)
            elif value != MISSING:  # which a file may say too, of a key that it does not set
                checked[f.name] = self._value(value, hints[name], key, f)
            elif is_dataclass(hints[name]):  # it may hold required keys
                self._section({}, hints[name], f"{key}.")
        return checked

    def _value(self, value: Any, hint: Any, key: str, f: Field[Any]) -> Any:
        if "or_list_of" in f.metadata and not is_dataclass(hint):
            return self._number_or_list(value, hint, key, f)
        if type(None) in typing.get_args(hint):
            if value is None:
                return None
            (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
        if is_dataclass(hint):
            return self._section(value, typing.cast(type, hint), f"{key}.")
        if typing.get_origin(hint) is list:
            return self._list(value, hint, key, f)
        if typing.get_origin(hint) is dict:
            return self._mapping(value, hint, key, f)
        if choices := choices_of(hint, f):
            if value not in choices:
                more = "; --import the module that adds another" if "names" in f.metadata else ""
                some = f"{', '.join(choices)}{more}"
                self._refuse(key, f"{key}: {shown(value)} is not one of {some}")
            return hint(value)
        if hint is Any:  # OmegaConf, which resolves references to keys, holds texts alone
            return _texts(value) if self._kind.interpolates else value
        return self._scalar(value, hint, key)

    def _number_or_list(self, value: Any, hint: Any, key: str, f: Field[Any]) -> Any:
        if not isinstance(value, list):
            return self._scalar(value, int, key)
        found = self._list(value, hint, key, f)
        if not self.refers:
            return found
        # OmegaConf, which takes the field for one of anything, is told what the sections are
        item = OmegaConf.structured(f.metadata["or_list_of"])
        return [OmegaConf.merge(item, each) for each in found]

    def _list(self, value: Any, hint: Any, key: str, f: Field[Any]) -> list[Any]:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list):
            some = "a list" if isinstance(value, dict) else f"a list such as [{value or ''}]"
            self._misshapen(key, value, self._kind.shapes.get(item, some))
        return [self._value(each, item, f"{key}.{i}", f) for i, each in enumerate(value)]

    def _mapping(self, value: Any, hint: Any, key: str, f: Field[Any]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._misshapen(key, value, "a mapping such as {NAME: value}")
        item = typing.get_args(hint)[1]
        return {
            str(name): self._value(each, item, f"{key}.{name}", f) for name, each in value.items()
        }

    def _scalar(self, value: Any, hint: type, key: str) -> Any:
        self._scalars[key] = value, hint
        if self.refers and _refers(value):
            return str(value)
        try:
            return scalars.read(value, hint)
        except scalars.Unreadable as error:
            self._refuse(key, self._wrong(key, value, hint, str(error)))

    def _wrong(self, key: str, value: Any, hint: type, fix: str) -> str:
        words = {int: self._kind.integer, float: "a number", bool: "true or false", str: "a text"}
        return f"{key}: {shown(value)} is not {words[hint]}" + (f"; {fix}" if fix else "")

    def _unknown(self, name: str, known: Iterable[str], prefix: str) -> typing.NoReturn:
        key = prefix + name
        if "." in name and has_key(self._kind.schema, key):
            first, _, rest = name.partition(".")
            self._refuse(key, f"{key!r}: in a file sections nest; write {nested(first, rest)}")
        if self._kind.listing:
            self._refuse(key, unknown_key(key, self._kind))
        self._refuse(key, unknown_name(name, known, prefix))

    def _misshapen(self, key: str, value: Any, right: str) -> typing.NoReturn:
        found = "empty" if value is None else shown(value)
        self._refuse(key, f"{key} is {found}; it must be {right}")

    def _refuse(self, key: str, message: str) -> typing.NoReturn:
        raise UserError(f"{message}{where(key, self._sources)}")

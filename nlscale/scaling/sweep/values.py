"""Values of a sweep file: of axes, budgets, keys and numbers, each checked as it is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from nlscale.config import recipe, scalars, schema
from nlscale.config.units import Period
from nlscale.errors import UserError

_MOST = 1_000_000
_PER_PARAMETER = "per_parameter"
_OURS = ("run.dir", "run.purpose", "resume.start", "checkpoint.steps", "checkpoint.keep_every")
"""Keys that a sweep sets itself."""


@dataclass(frozen=True)
class Budget:
    """The length of a run: so many tokens a parameter, or so many tokens."""

    per_parameter: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Value:
    """One value of an axis."""

    name: str
    """What a run that has it is called after it."""
    keys: dict[str, Any] = field(default_factory=dict)
    """The configuration keys that it sets."""
    budget: Budget | None = None
    """How long it trains, on the axis `tokens`."""
    target: int | None = None
    """Parameters it should have, on a ladder of sizes."""


def value_of_key(key: str, value: Any, where: str) -> Value:
    """A value of an axis that is named by its key."""
    keys = read_keys({key: value}, where)
    value = scalars.guess(value)
    return Value(
        folder_name(value if isinstance(value, str) else f"{key.split('.')[-1]}{value}"), keys
    )


def read_bundle(name: Any, tree: Any, where: str) -> Value:
    """A value of an axis that has a name and several keys."""
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{where} is {scalars.shown(tree)}; it must be keys such as {{model.d_model: 64}}"
        )
    return Value(folder_name(scalars.guess(name)), read_keys(tree, where))


def read_budgets(tree: Any, where: str) -> list[Value]:
    """The axis `tokens`: counts of them, or so many a parameter."""
    if isinstance(tree, list):
        return [
            Value(folder_name(scalars.guess(each)), budget=Budget(tokens=read_count(each, where)))
            for each in tree
        ]
    if isinstance(tree, dict):
        check_known(tree, (_PER_PARAMETER,), where)
        values = tree[_PER_PARAMETER]
        if isinstance(values, list) and values:
            counts = [read_number(each, where, float) for each in values]
            return [Value(f"{n:g}x", budget=Budget(per_parameter=n)) for n in counts]
    raise UserError(f"{where}: write {{{_PER_PARAMETER}: [5, 10, 20]}}, or token budgets: [1M, 2M]")


def read_keys(tree: Any, where: str) -> dict[str, Any]:
    """Configuration keys, dotted; nested mappings are flattened."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{where} is {scalars.shown(tree)}; it must be keys such as {{model.d_model: 64}}"
        )
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            inner = read_keys({f"{key}.{name}": item for name, item in value.items()}, where)
        else:
            check_key(str(key), where)
            inner = {str(key): value}
        twice = found.keys() & inner.keys()
        if twice:
            raise UserError(f"{where}: {min(twice)} is there twice")
        found |= inner
    return found


def check_key(key: str, where: str) -> None:
    """Refuse what is no key, or one that a sweep sets itself."""
    if key in _OURS:
        raise UserError(f"{where}: {key} is what a sweep sets itself for each run")
    if not recipe.has_key(key):
        raise UserError(f"{where}: {recipe.unknown_key(key)}")


def check_known(tree: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a name that is none of the known."""
    for key in tree:
        if key not in known:
            raise UserError(f"{where}: {schema.unknown_name(str(key), known)}")


def folder_name(value: Any) -> str:
    """A text that can be part of the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._+]+", ".", str(value)).strip(".") or "none"


def read_count(value: Any, where: str) -> int:
    """Tokens or parameters, such as 340M."""
    try:
        return Period.parse(f"{scalars.guess(value)} tokens").count
    except UserError:
        raise UserError(
            f"{where}: {scalars.shown(value)} is not a count such as 340M or 1.3B"
        ) from None


def as_text(value: Any) -> Any:
    """What an entry of a list is called; what is none is refused by who reads it."""
    return value if isinstance(value, str) else str(value)


def read_number(value: Any, where: str, kind: type) -> float:
    """A number of a grid, above 0 and at most `_MOST`."""
    try:
        found = float(scalars.read(value, kind))
    except scalars.Unreadable:
        found = math.nan
    if not 0 < found <= _MOST:
        what = "a whole number" if kind is int else "a number"
        raise UserError(
            f"{where} is {scalars.shown(value)}; it must be {what} above 0 and at most {_MOST:,}"
        )
    return found

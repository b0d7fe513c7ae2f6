"""The tasks by name: the one place that knows which there are. A new one takes a line here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

from nlscale.config import scalars
from nlscale.config.schema import nearest
from nlscale.data.index import Index
from nlscale.data.tasks import (
    PREFIX,
    babi,
    groups,
    languages,
    mad_copy,
    mad_recall,
    mqar,
    needle,
    text_needle,
)
from nlscale.data.tasks.task import Task, arguments
from nlscale.errors import UserError

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        mqar.Mqar,
        groups.Parity,
        groups.Modular,
        groups.S3,
        groups.S5,
        languages.EvenAs,
        languages.Abab,
        languages.Anbn,
        languages.Anbncn,
        languages.Shuffle2,
        mad_recall.Recall,
        mad_recall.FuzzyRecall,
        mad_recall.NoisyRecall,
        mad_recall.Memorise,
        mad_copy.SelectiveCopy,
        mad_copy.Compress,
        needle.Needle,
        text_needle.TextNeedle,
        babi.WhereIsSomeone,
        babi.WhereIsSomething,
        babi.WhereWasSomething,
    )
}

FAMILIES = {
    family: [name for name, kind in TASKS.items() if kind.family == family]
    for family in dict.fromkeys(kind.family for kind in TASKS.values())
}
"""The names of the tasks of each, as `nlscale eval` asks for them."""

_CALL = re.compile(r"(?P<name>[\w-]*)\s*(?:\((?P<given>[^()]*)\))?")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def task_of(text: str) -> Task:
    """The task that a text such as `mqar(length=64, pairs=8)` names; the rest has its defaults.

    Args:
        text: with or without `task:` before it.

    Raises:
        UserError: it names none, or an argument is unknown, of a wrong type or out of its range.
    """
    typed = text.removeprefix(PREFIX).strip()
    match = _CALL.fullmatch(typed)
    if match is None:
        raise UserError(
            f"task {typed[:80]!r} is not written as NAME(ARGUMENT=VALUE, ...), such as "
            f"{PREFIX}mqar(length=64, pairs=8)"
        )
    name = match["name"]
    if name not in TASKS:
        raise UserError(f"no task is called {name!r}; {nearest(name, TASKS)}")
    kind, given = TASKS[name], match["given"] or ""
    types, values = get_type_hints(kind), dict[str, Any]()
    known = [field.name for field in arguments(kind)]
    for part in (part.strip() for part in given.split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise UserError(f"task {name} has no argument {key!r}; {nearest(key, known)}")
        if not equals:
            raise UserError(f"task {name}: {key} has no value; write {key}=VALUE")
        if key in values:
            raise UserError(f"task {name}: {key} is given twice; leave one out")
        values[key] = _value(name, key, value, types[key])
    return kind(**values)


def _value(name: str, key: str, value: str, kind: type) -> Any:
    try:
        return scalars.read(value, kind)
    except scalars.Unreadable as error:
        fix = f"; {error}" if str(error) else ""
        raise UserError(f"task {name}: {key}={value} is not {_KINDS[kind]}{fix}") from None


def task_of_index(index: Index, directory: str | Path) -> Task:
    """The task that a data folder was made of.

    Raises:
        UserError: it was made of text.
    """
    if "task" not in index:
        raise UserError(
            f"{directory} holds text, and no task; build it with: nlscale data build --source "
            f"{PREFIX}NAME --out DIR"
        )
    return task_of(index["task"]["task"])


def listing() -> list[tuple[str, str]]:
    """Every task as it is when nothing is given, and what it asks."""
    return [(f"{PREFIX}{kind()}", kind.about) for kind in TASKS.values()]

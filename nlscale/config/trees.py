"""YAML as plain dicts and lists, whose scalars are the characters that were typed.

A scalar without quotes is a `Plain`, one in quotes a `str`, and what stands for no value is None.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from nlscale.config.scalars import NULLS, Plain

_MOST_NODES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_NEEDS_NO_QUOTES = re.compile(r"[\w.+/@%~=*-]+(?: [\w.+/@%=*-]+)*")


class _Loader(yaml.SafeLoader):
    """Guesses no types, and refuses a key that is there twice."""

    yaml_implicit_resolvers = {"<": [(_MERGE, re.compile("<<"))]}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != _MERGE:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name!r} is there twice", key.start_mark
                    )
                seen.add(name or "")
        return super().construct_mapping(node, deep)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is not None:
        return str(text)
    return None if text in NULLS else Plain(text)


_Loader.add_constructor(_TEXT, _scalar)


def load(text: str) -> Any:
    """What YAML holds.

    Raises:
        yaml.YAMLError: it is none, or has a key twice.
        ValueError: it holds itself, or nests too deeply.
    """
    try:
        return _copy(_parsed(text), iter(range(_MOST_NODES)))
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except StopIteration:
        raise ValueError(f"it has more than {_MOST_NODES:,} values") from None
    except (TypeError, OverflowError) as error:  # of an explicit tag
        raise ValueError(str(error)) from None


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """What YAML holds, to be copied: a sweep reads the same recipe once for each of its runs."""
    return yaml.load(text, _Loader)


@functools.lru_cache(maxsize=64)
def compose(text: str) -> yaml.Node | None:
    """Its nodes, with their lines, to be read only; raises as `load`."""
    try:
        return yaml.compose(text, _Loader)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def dump(value: Any) -> str:
    """A value in one line that `load` reads as the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)}: {dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, Plain) and _NEEDS_NO_QUOTES.fullmatch(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _key(name: Any) -> str:
    return (
        str(name)
        if _NEEDS_NO_QUOTES.fullmatch(str(name))
        else json.dumps(str(name), ensure_ascii=False)
    )


def _copy(value: Any, left: Iterator[int]) -> Any:
    """Without parts that are shared through anchors, so that each may be changed by itself.

    Raises StopIteration: anchors of anchors make more of it than there are numbers `left`.
    """
    next(left)
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            found[key if isinstance(key, str) else str(key)] = _copy(item, left)
        return found
    if isinstance(value, list):
        copied = []
        for item in value:
            copied.append(_copy(item, left))  # no comprehension: StopIteration has to get out
        return copied
    return value

"""What is typed, and what a key makes of it: a text, a whole number, a number, true or false.

YAML guesses types from the characters: it takes 007 for 7, 12:30 for 750 and 1_1 for 11. Here the
type of the key decides, and the characters are kept until it has: a text is what was typed, and a
number that could mean two things is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


class Plain(str):
    """The characters of a scalar without quotes, as they were typed."""


class Unreadable(ValueError):
    """The characters are not of the type; its text is a hint, or empty."""


_SIGN = r"[-+]?"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_WHOLE = re.compile(rf"{_SIGN}{_DIGITS}")
_NUMBER = re.compile(rf"{_SIGN}(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE]{_SIGN}[0-9]+)?")
_NOT_FINITE = re.compile(rf"{_SIGN}\.?(?:inf|nan)", re.IGNORECASE)
_LEADING_ZERO = re.compile(rf"{_SIGN}0_?[0-9]")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NULLS = ("", "~", "null", "Null", "NULL")
"""What stands for no value, where it is not in quotes."""


def whole(text: str) -> int:
    """A whole number, such as 10, -3 or 1_000_000.

    Raises:
        Unreadable: it is none, begins with a zero, which some read as octal, or is too long.
    """
    if not _WHOLE.fullmatch(text):
        value = number(text)
        raise Unreadable(f"write {value:.0f}" if value == value // 1 else "")
    _refuse_leading_zero(text)
    if len(text) > 40:
        raise Unreadable("it has too many digits")
    return int(text)


def number(text: str) -> float:
    """A number, such as 10, 1.5 or 3e-4; also .inf and .nan, which no key takes.

    Raises:
        Unreadable: it is none, or begins with a zero.
    """
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not _NUMBER.fullmatch(text):
        raise Unreadable("")
    _refuse_leading_zero(text)
    return float(text)


def truth(text: str) -> bool:
    """true or false; also yes, no, on, off, 1 and 0.

    Raises:
        Unreadable: it is neither.
    """
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise Unreadable("")


def _text(text: str) -> str:
    return str(text)


_READ: dict[type, Callable[[str], Any]] = {int: whole, float: number, bool: truth, str: _text}
TYPES = tuple(_READ)
"""Of the keys that hold a scalar."""


def read(value: Any, wanted: type) -> Any:
    """A scalar as one of a type.

    Args:
        value: the characters, or what is a number or a truth already.
        wanted: `int`, `float`, `bool` or `str`.

    Raises:
        Unreadable: it is not of that type.
    """
    if not isinstance(value, str):
        if wanted is float and type(value) is int:
            return float(value)
        if type(value) is wanted:
            return value
        raise Unreadable("put it in quotes" if wanted is str and value is not None else "")
    return _READ[wanted](value)


def guess(value: Any) -> Any:
    """What a scalar looks like where no key says what it is: a number, a truth, or a text.

    Of lists and mappings, all that is in them.
    """
    if isinstance(value, dict):
        return {guess(key): guess(item) for key, item in value.items()}
    if isinstance(value, list):
        return [guess(item) for item in value]
    if not isinstance(value, Plain) or value.lower() in ("nan", "inf"):
        return value
    for read_as in (whole, number):
        try:
            return read_as(value)
        except Unreadable:
            continue
    if value.lower() in (*_TRUE, *_FALSE):
        return truth(value)
    return str(value)


def shown(value: Any) -> str:
    """A value as YAML writes it, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Plain) and not isinstance(guess(value), str):
        return str(value)
    return repr(str(value)) if isinstance(value, str) else repr(value)


def _refuse_leading_zero(text: str) -> None:
    if _LEADING_ZERO.match(text):
        sign = text[0] if text[0] in "+-" else ""
        raise Unreadable(
            f"it begins with a zero; write {sign}{text.lstrip('+-').lstrip('0_') or 0}"
        )

"""Records: which of their fields is the text, and which part of it counts."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from nlscale.data.formats.base import Document, UnreadableError, failed, utf8
from nlscale.data.spans import COMPLETION, MASK, PROMPT, SpansError, spans_of
from nlscale.data.tally import shown
from nlscale.errors import UserError

NO_FIELD, NO_RECORD, NO_COLUMN = "no such field", "not an object", "no such column"
_NAMED_FIELDS = 8
_SHOWN = 40  # characters of a name that comes out of a file
_TYPES = {type(None): "null", bool: "a boolean", float: "a number", int: "a number"}
_TYPES |= {list: "a list", dict: "an object", str: "a string", bytes: "bytes"}
# not int: of one with 5,000 digits Python makes an error, which is none of the text's
_DECODER = json.JSONDecoder(parse_int=float)
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|\\[nt\\]|[{}]")
_SPELLED = {"{{": "{", "}}": "}", "\\n": "\n", "\\t": "\t", "\\\\": "\\"}


class Template(NamedTuple):
    """What the text of a record is: `fields` that it is made of, and how.

    `pieces` stand one after the other: text before a field, and the field, "" behind the last. They
    are empty where the text is one field, as it is.
    """

    fields: tuple[str, ...]
    pieces: tuple[tuple[str, str], ...] = ()


@lru_cache
def template_of(field: str) -> Template:
    r"""What `--text-field` says: the name of a field, or a template, which is what has braces.

    `{name}` is a field, `{{` and `}}` are braces, and `\n`, `\t` and `\\` what they are in Python.

    Raises:
        UserError: a brace is left alone, or no field is named.
    """
    if "{" not in field and "}" not in field:
        return Template((field,))
    pieces: list[tuple[str, str]] = []
    text, end = "", 0
    for match in _PIECE.finditer(field):
        text += field[end : match.start()]
        end = match.end()
        if match[1]:
            pieces.append((text, match[1]))
            text = ""
        elif match[0] in _SPELLED:
            text += _SPELLED[match[0]]
        else:
            alone = "{} names no field" if match[1] == "" else f"{match[0]} stands alone"
            raise UserError(
                f"the template {field!r} cannot be read: {alone}, at {match.start()}; write it as "
                f"'{{title}}\\n\\n{{text}}', and a brace as {match[0][0] * 2}"
            )
    if not pieces:
        raise UserError(f"the template {field!r} names no field; write one as {{text}}")
    text += field[end:]
    fields = tuple(dict.fromkeys(name for _, name in pieces))
    if len(pieces) == 1 and not pieces[0][0] and not text:
        return Template(fields)
    return Template(fields, (*pieces, (text, "")))


def columns(there: list[str], template: Template) -> list[str]:
    """Those to be read of a table. Raises UnreadableError: they are not there, each once."""
    missing = not set(template.fields) <= set(there)
    in_parts = missing and not template.pieces and {PROMPT, COMPLETION} <= set(there)
    wanted = [PROMPT, COMPLETION] if in_parts else [*template.fields]
    if MASK in there and MASK not in wanted:
        wanted.append(MASK)
    for name in wanted:
        if there.count(name) != 1:
            several = "more than one" if name in there else "no"
            raise UnreadableError(NO_COLUMN, f"{several} column {name!r} {_has(there)}")
    return wanted


def parse(data: bytes) -> Any:
    """The value that JSON spells. Raises ValueError, RecursionError."""
    # NUL bytes and byte order marks: whole files in UTF-16 are JSON too
    plain = b"\0" not in data and not data.startswith(b"\xef\xbb\xbf")
    return _DECODER.decode(data.decode("utf-8" if plain else json.detect_encoding(data)))


def is_object(line: bytes) -> bool:
    """Whether a line is one of JSON by itself."""
    if line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
        return False
    try:
        return isinstance(parse(line), dict)
    except (ValueError, RecursionError):
        return False


def parsed(name: str, template: Template, data: bytes, consumed: int) -> Document:
    """The document of a record in JSON."""
    try:
        value = parse(data)
    except UnicodeDecodeError as error:
        return failed(name, consumed, *utf8(error))
    except (ValueError, RecursionError) as error:
        return failed(name, consumed, "not JSON", f"not JSON ({error})")
    return record(name, template, value, consumed)


def record(name: str, template: Template, value: Any, consumed: int) -> Document:
    """The document of a record."""
    if not isinstance(value, dict):
        return failed(name, consumed, NO_RECORD, f"it is {_type(value)}, not an object")
    mask = value.get(MASK) if MASK not in template.fields else None
    lacking = [field for field in template.fields if field not in value]
    if not lacking:
        parts = {field: value[field] for field in template.fields}
        return _checked(name, consumed, template, parts, mask)
    if not template.pieces and {PROMPT, COMPLETION} <= value.keys():
        parts = {key: value[key] for key in (PROMPT, COMPLETION)}
        return _checked(name, consumed, None, parts, mask)
    return failed(name, consumed, NO_FIELD, f"no {lacking[0]!r} {_has(list(value))}")


def _checked(
    name: str, consumed: int, template: Template | None, parts: dict[str, Any], mask: Any
) -> Document:
    """The document of a text; without a template it is in two parts, of which the second counts."""
    for key, part in parts.items():
        if not isinstance(part, str):
            why = f"its {key!r} is {_type(part)}, not a string"
            return failed(name, consumed, f"{key!r} not a string", why)
    if mask is not None and (template is None or template.pieces):
        if template is None:
            why = f"{PROMPT!r} and {COMPLETION!r} say what counts, and so does {MASK!r}"
            return failed(name, consumed, "two masks", f"{why}: leave one out")
        why = f"its {MASK!r} is of one field, and its text is made of a template: leave one out"
        return failed(name, consumed, "mask with a template", why)
    text = "".join(parts.values())
    if template is not None and template.pieces:
        text = "".join(before + parts.get(field, "") for before, field in template.pieces)
    try:
        spans = spans_of(mask, len(text))
        if template is None:
            spans = ((len(parts[PROMPT]), len(text)),)
        return Document(name, text, text.encode("utf-8"), consumed, spans=spans)
    except SpansError as error:
        return failed(name, consumed, error.kind, str(error))
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        return failed(name, consumed, *utf8(error))


def _type(value: object) -> str:
    return _TYPES.get(type(value), type(value).__name__)


def _has(names: list[str]) -> str:
    """The fields that there are, in brackets."""
    if not names:
        return "(there is none)"
    more = ", ..." if len(names) > _NAMED_FIELDS else ""
    return f"(there are {', '.join(shown(name, _SHOWN) for name in names[:_NAMED_FIELDS])}{more})"

"""Whether records are what tables of fields say of them: see `nlscale.telemetry.fields`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nlscale.telemetry.fields import Field

TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "text": (str,),
    "number or text": (int, float, str),
    "true or false": (bool,),
    "object": (dict,),
}
LISTS = {f"list of {inner}s": inner for inner in ("object", "text", "number", "integer")}


def differences(record: Mapping[str, Any], fields: Mapping[str, Field], at: str = "") -> set[str]:
    """How a record differs from its description; `not_finite` excuses the nulls it names."""
    lost = record.get("not_finite", [])
    return {each for each in _differences(record, fields, at) if each.partition(":")[0] not in lost}


def _differences(record: Mapping[str, Any], fields: Mapping[str, Field], at: str) -> set[str]:
    found = set()
    for name, value in record.items():
        key = f"{at}{name}"
        field = fields.get(name) or next((fields[k] for k in fields if k.isupper()), None)
        if field is None:
            found.add(f"{key}: not described")
        elif value is None:
            found |= set() if field.null else {f"{key}: null"}
        elif not _is(value, field.type):
            found.add(f"{key}: {value!r} is no {field.type}")
        elif field.type == "object":
            found |= _differences(value, field.fields, f"{key}.")
        elif field.type == "list of objects":
            found |= set().union(*(_differences(v, field.fields, f"{key}[].") for v in value))
    missing = {k for k, f in fields.items() if not (k.isupper() or f.only)} - record.keys()
    return found | {f"{at}{name}: missing" for name in missing}


def _is(value: Any, type_: str) -> bool:
    if inner := LISTS.get(type_):
        return isinstance(value, list) and all(_is(one, inner) for one in value)
    return isinstance(value, TYPES[type_]) and isinstance(value, bool) <= (type_ == "true or false")

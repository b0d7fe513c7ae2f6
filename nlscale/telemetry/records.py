"""What is a record of metrics.jsonl, and what is a line that something else has left there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nlscale.telemetry.fields import METRICS, Field

SET_ASIDE_FILE = "set-aside.jsonl"
"""Beside metrics.jsonl: its lines that belong to the run no longer, oldest first. Those that were
no records are objects `{"kind": "unreadable", "line": TEXT}`."""
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "text": (str,),
    "object": (dict,),
    "list of objects": (list,),
}
_STEP = {"step": METRICS["train"]["step"]}


def parse(line: bytes) -> dict[str, Any]:
    """The record in a line.

    A record of a kind that is known has a `step`; of the fields that `nlscale.telemetry.fields`
    describes it may lack others, as those of an older version do, but what it has is of their
    types, or null.

    Raises:
        ValueError: what keeps it from being one.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    kind = record.get("kind")
    fields = METRICS.get(kind) if isinstance(kind, str) else None
    if fields is not None and record.get("step") is None:
        raise ValueError(f"a {kind} record without step")
    if wrong := mistyped(record, fields or _STEP):
        raise ValueError(wrong)
    return record


def mistyped(record: Mapping[str, Any], fields: Mapping[str, Field]) -> str | None:
    """What a record has of another type than its description says, in words; null may be anything.

    Fields that are not described, or lacking, are not looked at.
    """
    for name, value in record.items():
        known = fields.get(name)
        if known is not None and value is not None and _is_not(value, known):
            return f"{name} is {str(value)[:40]!r}, not {known.type}"
    return None


def _is_not(value: Any, field: Field) -> bool:
    types = _TYPES.get(field.type)
    if types is None:
        return False
    if not isinstance(value, types) or isinstance(value, bool):
        return True
    if isinstance(value, list):
        return any(not isinstance(v, dict) or mistyped(v, field.fields) for v in value)
    if not isinstance(value, dict):
        return False
    # a name in capitals stands for names that the run gives, such as those of its levels
    named = next((inner for name, inner in field.fields.items() if name.isupper()), None)
    if named is None:
        return mistyped(value, field.fields) is not None
    return any(inner is None or _is_not(inner, named) for inner in value.values())

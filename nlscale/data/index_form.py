"""Whether what an `index.json` says can be: it may come from anywhere, and decides what is read.

A name leads to no other folder, numbers are numbers and agree with each other; so that reading
tokens can rely on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_Rule = Callable[[Any, str], None]  # a value and where it is; raises IndexFormError

_BITS = {"uint8": 8, "uint16": 16, "uint32": 32}
_MOST = (1 << 62) - 1  # of any number: sums and products with it stay exact where numpy has int64
_NAME = re.compile(r"[\w-][\w.-]{0,199}")
_SHOWN = 60  # characters of a value


class IndexFormError(ValueError):
    """What is wrong, and at which key."""


def check(index: Mapping[str, Any], masked: bool) -> None:
    """Check all that readers use of an index of a format that this version knows.

    Args:
        index: as it was read.
        masked: whether that is the format with masks.

    Raises:
        IndexFormError: a key is missing or has a value that cannot be.
    """
    _object(_INDEX, _SINCE)(index, "")
    bits, vocabulary = _BITS[index["dtype"]], index["vocabulary"]
    if vocabulary > 1 << bits:
        raise _wrong("vocabulary", vocabulary, f"at most {1 << bits}, for {index['dtype']}")
    if index["separator"] >= vocabulary:
        raise _wrong("separator", index["separator"], f"below the vocabulary, {vocabulary}")
    packed = index.get("packed")
    if packed is not None and not masked:
        raise _wrong("packed", packed, "left to the format with masks")
    if not index["splits"]:
        raise _wrong("splits", index["splits"], "not empty")
    names: set[str] = set()
    for split, entry in index["splits"].items():
        where = f"splits.{split}"
        for number, shard in enumerate(entry["shards"]):
            at = f"{where}.shards[{number}]"
            if shard["name"] in names:
                raise _wrong(f"{at}.name", shard["name"], "named once")
            names.add(shard["name"])
            _extent(shard, at, index["block_tokens"], bits // 8)
            if masked:
                _masks(shard, at, index["block_tokens"], bits // 8)
            elif "mask_offset" in shard:
                raise _wrong(f"{at}.mask_offset", shard["mask_offset"], "left to the other format")
        tokens = sum(shard["tokens"] for shard in entry["shards"])
        if tokens != entry["tokens"]:
            raise _wrong(f"{where}.tokens", entry["tokens"], f"{tokens}, the sum of its shards")
        if packed is not None and tokens % packed["length"]:
            samples = f"a multiple of packed.length, {packed['length']}"
            raise _wrong(f"{where}.tokens", tokens, samples)
        text = entry["bytes"]
        _by_source(entry, where, index.get("packed", {}).get("padding", {}).get(split, 0))
        if masked:
            _counted(entry, where)
            text = entry["counted_bytes"]
        if split == "validation" and text and index["unigram_bits_per_byte"] is None:
            raise _wrong("unigram_bits_per_byte", None, "a number, as there is text to validate on")


def _extent(shard: Mapping[str, Any], at: str, block_tokens: int, width: int) -> None:
    """The blocks of a shard do not overlap, and lie inside it."""
    blocks = -(-shard["tokens"] // block_tokens)
    if shard["blocks"] != blocks:
        raise _wrong(f"{at}.blocks", shard["blocks"], f"{blocks} for its tokens")
    if blocks > 1 and shard["stride"] < block_tokens * width:
        raise _wrong(f"{at}.stride", shard["stride"], f"at least {block_tokens * width}, a block")
    last = shard["tokens"] - (blocks - 1) * block_tokens
    end = shard["offset"] + (blocks - 1) * shard["stride"] + last * width
    if end > shard["size_bytes"]:
        raise _wrong(f"{at}.size_bytes", shard["size_bytes"], f"at least {end}, for its blocks")


def _masks(shard: Mapping[str, Any], at: str, block_tokens: int, width: int) -> None:
    """The mask of each block lies before its ids and after the block before."""
    _object({"mask_offset": _whole(0)})(shard, at)
    mask, ids = -(-block_tokens // 8), block_tokens * width
    before = shard["offset"] - shard["mask_offset"]
    if before < mask:
        most = shard["offset"] - mask
        raise _wrong(f"{at}.mask_offset", shard["mask_offset"], f"at most {most}, for its masks")
    if shard["blocks"] > 1 and shard["stride"] < before + ids:
        raise _wrong(f"{at}.stride", shard["stride"], f"at least {before + ids}, a block")


def _by_source(split: Mapping[str, Any], at: str, padding: int) -> None:
    """The parts of the sources add up, with the tokens that fill packed samples up."""
    for figure in ("documents", "tokens", "bytes") if "sources" in split else ():
        found = sum(source[figure] for source in split["sources"])
        found += padding if figure == "tokens" else 0
        if found != split[figure]:
            raise _wrong(f"{at}.{figure}", split[figure], f"{found}, the sum of its sources")


def _counted(split: Mapping[str, Any], at: str) -> None:
    """What counts is a part of what there is."""
    for name, of in (("counted_tokens", "tokens"), ("counted_bytes", "bytes")):
        _object({name: _whole(0, split[of])})(split, at)


def _whole(low: int, high: int = _MOST) -> _Rule:
    def rule(value: Any, at: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(at, value, f"a whole number from {low} to {high}")

    return rule


def _text(pattern: str, what: str) -> _Rule:
    form = re.compile(pattern, re.DOTALL)

    def rule(value: Any, at: str) -> None:
        if not isinstance(value, str) or not form.fullmatch(value):
            raise _wrong(at, value, what)

    return rule


def _figure(value: Any, at: str) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise _wrong(at, value, "a number of at least 0")


def _figure_or_null(value: Any, at: str) -> None:
    if value is not None:
        _figure(value, at)


def _name(value: Any, at: str) -> None:
    """Also of what lies beside the index: nobody who wrote it chooses what else is opened."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _wrong(at, value, "the name of a file in this folder")


def _list(each: _Rule) -> _Rule:
    def rule(value: Any, at: str) -> None:
        if not isinstance(value, list):
            raise _wrong(at, value, "a list")
        for number, item in enumerate(value):
            each(item, f"{at}[{number}]")

    return rule


def _object(rules: Mapping[str, _Rule], optional: Mapping[str, _Rule] | None = None) -> _Rule:
    known = [*{**rules, **(optional or {})}.items()]  # here: there are thousands of shards

    def rule(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(at, value, "an object")
        prefix = f"{at}." if at else ""
        for key, check_value in known:
            here = prefix + key
            if key in value:
                check_value(value[key], here)
            elif key in rules:
                raise IndexFormError(f"{here} is missing")

    return rule


def _by_name(key_rule: _Rule, value_rule: _Rule) -> _Rule:
    def rule(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(at, value, "an object")
        for key, item in value.items():
            key_rule(key, at)
            value_rule(item, f"{at}.{key}")

    return rule


def _wrong(at: str, value: Any, what: str) -> IndexFormError:
    # a container is not shown: it may be as deep as its writer liked
    found = ascii(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    if len(found) > _SHOWN:
        found = found[:_SHOWN] + "..."
    return IndexFormError(f"{at or 'it'} is {found}, and must be {what}")


_ANY = _text(r".*", "a text")
_SHARD = _object(
    {
        "name": _name,
        "tokens": _whole(1),
        "blocks": _whole(1),
        "size_bytes": _whole(1),
        "sha256": _text(r"[0-9a-f]{64}", "a sha256 in hexadecimal"),
        "offset": _whole(0),
        "stride": _whole(0),
    }
)
_SPLIT = _object(
    {
        "documents": _whole(1),
        "tokens": _whole(1),
        "bytes": _whole(0),
        "shards": _list(_SHARD),
    },
    {
        "sources": _list(
            _object(
                {
                    "source": _ANY,
                    "documents": _whole(0),
                    "tokens": _whole(0),
                    "bytes": _whole(0),
                }
            )
        )
    },
)
_COUNTS = _by_name(_ANY, _whole(0))
_INDEX: dict[str, _Rule] = {
    "fingerprint": _ANY,
    "sources": _list(_ANY),
    "tokenizer": _ANY,
    "vocabulary": _whole(1),
    "separator": _whole(0),
    "dtype": _text("|".join(_BITS), f"one of {', '.join(_BITS)}"),
    "block_tokens": _whole(1),
    "splits": _by_name(_name, _SPLIT),
    "skipped": _object(
        {
            "count": _whole(0),
            "first": _list(_object({"document": _ANY, "reason": _ANY})),
        },
        {"reasons": _COUNTS},
    ),
    "empty_documents": _whole(0),
    "unigram_bits_per_byte": _figure_or_null,
}
_SINCE: dict[str, _Rule] = {  # which earlier builds of the same format do not have
    "task": _object(
        {
            "task": _ANY,
            "about": _ANY,
            "length": _whole(1),
            "seed": _whole(-(1 << 63), (1 << 64) - 1),
            "repeated": _COUNTS,
        }
    ),
    "text_field": _ANY,
    "tokenizer_sha256": _text(r"[0-9a-f]{64}", "a sha256 in hexadecimal"),
    "packed": _object(
        {
            "length": _whole(1),
            "window": _whole(1),
            **dict.fromkeys(("cut", "unended", "padding"), _COUNTS),
        }
    ),
    "duplicates": _object({"count": _whole(0), "bytes": _whole(0), "reasons": _COUNTS}),
    "lost_files": _object(
        {
            "count": _whole(0),
            "of": _whole(0),
            "first": _list(_object({"file": _ANY, "reason": _ANY})),
            "reasons": _COUNTS,
        }
    ),
    "left_out": _list(
        _object({"reason": _ANY, "count": _whole(0), "bytes": _whole(0), "first": _list(_ANY)})
    ),
}

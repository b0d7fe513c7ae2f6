"""Lengths of contexts as they are typed: 256, 4k, 1M. No torch is imported."""

from __future__ import annotations

import argparse
import re

_LENGTH = re.compile(r"([1-9][0-9]{0,9})([kM]?)")
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20}
_MOST = 1 << 30


def lengths(text: str) -> list[int]:
    """A `type` of argparse: tokens, in ascending order, such as 256,1k,4k; 1k is 1,024."""
    found = []
    for part in text.split(","):
        match = _LENGTH.fullmatch(part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of lengths; write such as 256,1k,4k (1k is 1,024 tokens)"
            )
        found.append(int(match[1]) * _UNITS[match[2]])
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not in ascending order, each once")
    if found[-1] > _MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: a length is at most {shown(_MOST)}")
    return found


def shown(length: int) -> str:
    """A length as it is typed."""
    for letter, unit in (("M", 1 << 20), ("k", 1 << 10)):
        if length % unit == 0:
            return f"{length // unit}{letter}"
    return str(length)

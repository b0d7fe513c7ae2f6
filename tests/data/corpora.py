"""Helpers of the tests of building: small builds, and what is in them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlscale.data import TokenShards
from nlscale.data.build import build
from nlscale.data.index import Index


def zst(data: bytes) -> bytes:
    """One frame of Zstandard."""
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}
"""Compress, by suffix."""


def small(sources: list[str], out: Path, **options: Any) -> Index:
    """A build with blocks and shards so small that documents cross both."""
    defaults = {"held_out": 0.2, "shard_tokens": 700, "block_tokens": 100}
    return build(sources, "bytes", out, **{**defaults, **options})


def documents(out: Path, split: str) -> list[str]:
    """The documents of a split, cut at the separators."""
    shards = TokenShards(out, split)
    data = bytes(shards.read(0, shards.tokens).astype(np.uint8))
    assert data.endswith(b"\xff")
    return [part.decode() for part in data[:-1].split(b"\xff")]


def everything(out: Path) -> list[str]:
    """The documents of both splits, sorted."""
    return sorted(documents(out, "train") + documents(out, "validation"))


def lines(texts: list[str], field: str = "text") -> bytes:
    """JSON lines."""
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in texts)


def left_out(index: Index) -> dict[str, int]:
    """How many files, or what else, are left out, by reason."""
    return {entry["reason"]: entry["count"] for entry in index["left_out"]}

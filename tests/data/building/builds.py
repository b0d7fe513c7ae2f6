"""Helpers of the tests of building by units: a corpus of several, and all that a build has made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from nlscale.data.build import build, build_by_source
from nlscale.data.index import Index
from nlscale.data.verified import VERIFIED_NAME

UNIT = 2500


def corpus(folder: Path, masks: bool = False) -> list[str]:
    """Two sources of nine files, some of which repeat others' texts, and a few that are broken."""
    draw = random.Random(5)
    texts = [f"text {i} " + "äb c\r\n" * draw.randrange(60) for i in range(60)]
    for source, count in (("a", 5), ("b", 4)):
        (folder / source).mkdir(parents=True)
        for number in range(count):
            lines = [record(draw.choice(texts), draw, masks) for _ in range(12)]
            lines[3] = '{"text": "broken'
            lines[5] = '{"text": ""}'
            path = folder / source / f"{number}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "b" / "one.txt").write_text("a text of its own\n")
    return [str(folder / "a"), str(folder / "b")]


def record(text: str, draw: random.Random, masks: bool) -> str:
    """A line of JSON lines, a third of them with a mask."""
    value: dict[str, Any] = {"text": text}
    if masks and draw.random() < 0.3:
        value["mask"] = [[1, draw.randrange(1, 4)]]
    return json.dumps(value, ensure_ascii=draw.random() < 0.5)


def units(sources: list[str], out: Path, tokenizer: str = "bytes", **options: Any) -> Index:
    """A build of a handful of units, with blocks and shards so small that units have several."""
    defaults = {"held_out": 0.2, "shard_tokens": 700, "block_tokens": 100, "max_lost": 0.5}
    return build(sources, tokenizer, out, **{"unit_bytes": UNIT, **defaults, **options})


def contents(out: Path) -> dict[str, bytes]:
    """All that lies in a folder, but for what is remembered of times."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != VERIFIED_NAME}


def units_by_source(
    sources: list[str], out: Path, tokenizer: str = "bytes", **options: Any
) -> dict[str, Index]:
    """As `units`, into a data folder for each source."""
    defaults = {"held_out": 0.2, "shard_tokens": 700, "block_tokens": 100, "max_lost": 0.5}
    options = {"unit_bytes": UNIT, **defaults, **options}
    return build_by_source(sources, tokenizer, out, **options)

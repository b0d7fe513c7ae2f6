"""Small data folders to mix, and configurations that mix them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.data.build import build

WORDS = {"web": "level window period", "code": "def return x = 1", "books": "once upon a time"}


def folder(root: Path, name: str, documents: int = 12, **options: Any) -> Path:
    """A data folder of that name, of words of its own; bytes, unless `tokenizer` says otherwise."""
    text, draw = root / "text" / name, random.Random(name)
    text.mkdir(parents=True)
    for i in range(documents):
        words = draw.choices(WORDS.get(name, name).split(), k=120)
        (text / f"{i}.txt").write_text(" ".join(words))
    tokenizer = options.pop("tokenizer", "bytes")
    out = root / name
    build([str(text)], tokenizer, out, **{"held_out": 0.3, **options})
    return out


def mixed(*sources: str, overrides: tuple[str, ...] = ()) -> Config:
    """A run on a mixture; each source as YAML writes it, without braces."""
    listed = ", ".join(f"{{{source}}}" for source in sources)
    return recipe.load(None, [f"data.mixture=[{listed}]", *overrides]).config

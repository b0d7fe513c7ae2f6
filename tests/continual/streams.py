"""Tiny streams for tests: a recipe and a stream file in a folder of the test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scaling.sweeps import RECIPE

from nlscale.cli import main


def write_stream(folder: Path, data: Path | str, **more: Any) -> Path:
    """A stream file in that folder: `web` for 5 steps, then `books` for 4."""
    recipe, path = folder / "recipe.yaml", folder / "stream.yaml"
    model = {"model": {**RECIPE["model"], "vocabulary": 256}, "data": {"sequence_length": 16}}
    recipe.write_text(yaml.safe_dump({**RECIPE, **model}))
    stream = {
        "recipe": str(recipe),
        "dir": str(folder / "runs"),
        "tasks": {
            "web": {"data": f"{data}/web", "steps": 5},
            "books": {"data": [{"dir": f"{data}/books", "weight": 1}], "tokens": "512"},
        },
        "methods": {"naive": None},
        "workers": 1,
    }
    path.write_text(yaml.safe_dump({**stream, **more}, sort_keys=False))
    return path


def learn(stream: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `nlscale continual --json` prints, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["continual", str(stream), "--json", *arguments])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found

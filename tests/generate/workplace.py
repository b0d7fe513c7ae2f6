"""A folder that looks as if the quickstart had been trained there, in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import world
from train.test_train_run import run, small_data


def workplace(folder: Path) -> Path:
    """Runs `quickstart` and `other`, of another mixer, on data where the quickstart's are."""
    (folder / "text").mkdir()
    (folder / "data").mkdir()
    small_data(folder / "text", documents=40, held_out=0.1).rename(folder / "data" / "stdlib")
    world.run(1, _train, folder)
    return folder


def _train(folder: Path) -> None:
    os.chdir(folder)
    for name, mixer in (("quickstart", "hope"), ("other", "gated-delta")):
        overrides = ["data.dir=data/stdlib", f"run.dir=runs/{name}", f"model.mixer={mixer}"]
        # levels as the quickstart names them
        levels = "levels=[{name: fast}, {name: medium, period: 2}, {name: slow, period: 4}]"
        assert "error" not in run([*overrides, levels])

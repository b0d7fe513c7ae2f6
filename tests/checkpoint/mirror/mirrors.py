"""What tests of mirrors share: runs with a mirror, and what it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint import stores

from nlscale.checkpoint.mirror.label import Label, take
from nlscale.checkpoint.mirror.remote import MANIFEST, Remote, folder_of
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.config import recipe
from nlscale.config.vocabulary import Config

DATA: dict[str, Any] = {"fingerprint": "of the tests", "train_tokens": 1}


def config_of(url: str | None, *overrides: str) -> Config:
    mirror = [] if url is None else [f"checkpoint.mirror={url}"]
    return recipe.load(None, ["data.dir=x", *mirror, *overrides]).config


def taken(url: str, run_dir: Path, *overrides: str) -> Label:
    """The mirror, as a run in that folder takes it when it starts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = config_of(url, *overrides)
    label = take(config, DATA, run_dir, Store(run_dir / "checkpoints"))
    assert label is not None
    return label


def saved(folder: Path, step: int, seed: int | None = None) -> Checkpoint:
    stores.save(folder, step, seed=step if seed is None else seed)
    return next(c for c in Store(folder).checkpoints() if c.step == step)


def holds(remote: Remote, checkpoint: Checkpoint) -> bool:
    """Whether the mirror has the very bytes of a checkpoint, and counts it."""
    name = folder_of(checkpoint.step)
    files = {path.name: path.read_bytes() for path in checkpoint.path.iterdir()}
    there = remote.listing().get(checkpoint.step, {})
    return (
        MANIFEST in there
        and there.keys() == files.keys()
        and all(remote.read(f"{name}/{file}") == data for file, data in files.items())
    )


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what a thread will do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)

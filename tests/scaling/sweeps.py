"""Tiny sweeps for tests: a recipe, data and a sweep file in a folder of the test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import world
import yaml

from nlscale.telemetry.figures import SUMMARY_FILE

RECIPE = {
    "model": {"layers": 1, "d_model": 32, "heads": 2, "memory": {"chunk": 8}},
    "levels": [1, 2, 4],
    "optimizer": {"warmup_steps": 2},
    "train": {
        "steps": 9,
        "global_batch": 8,
        "micro_batch": 8,  # one a step: what a sweep does with runs does not depend on it
        "dtype": "fp32",
        "validate_every": 1000,
        "validation_sequences": 8,
    },
    "checkpoint": {"every": "4 steps"},
}
WSD = {
    "optimizer.schedule": "wsd",
    "optimizer.decay_fraction": 0.25,
}


def make_data(folder: Path) -> Path:
    """Shards that tiny runs read, which draw no figures where they are forked from this process."""
    world.ready()
    from train.test_train_run import small_data  # imports torch

    return small_data(folder, documents=20, held_out=0.2)


def write_sweep(folder: Path, data: Path | str, axes: dict[str, Any], **more: Any) -> Path:
    """A sweep file in that folder, over a tiny recipe, with these axes and further keys."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": {"dir": str(data), "sequence_length": 16}}))
    path = folder / "sweep.yaml"
    sweep = {"recipe": str(recipe), "dir": str(folder / "runs"), "axes": axes, "workers": 2}
    path.write_text(yaml.safe_dump(sweep | more, sort_keys=False))
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`nlscale sweep ...` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nlscale", "sweep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished_runs(sweep: Path) -> set[str]:
    """Names of the runs with a summary."""
    return {path.parent.name for path in (sweep.parent / "runs").glob(f"*/{SUMMARY_FILE}")}

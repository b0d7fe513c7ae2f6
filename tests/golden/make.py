"""Golden losses: a 20-step loss curve of each family of recipes, made by one process in fp32.

    python tests/golden/make.py

writes them anew. Do that only when a change is meant to change the numbers, and say so in the
change log; `test_golden_losses.py` holds every layout to them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import world  # noqa: E402

from nlscale.config import recipe  # noqa: E402
from nlscale.levels.spectrum import spectrum  # noqa: E402
from nlscale.parallel.layout import process_groups  # noqa: E402
from nlscale.step.micro_batches import Batch  # noqa: E402
from nlscale.train.loop import Trainer  # noqa: E402

STEPS, VOCABULARY, LENGTH, BATCH = 20, 64, 32, 8
COMMON = [
    "data.dir=none",
    f"data.sequence_length={LENGTH}",
    "model.layers=4",
    "model.d_model=64",
    "model.heads=4",
    "model.memory.chunk=16",
    "optimizer.learning_rate=3e-3",
    "optimizer.warmup_steps=5",
    "train.dtype=fp32",
    f"train.steps={STEPS}",
    f"train.global_batch={BATCH}",
    "train.micro_batch=4",
]
FAMILIES = {
    "hope": ["model.mixer=hope", "levels=[1,2,4]"],
    "hope-independent": ["model.mixer=hope", "model.cms=independent", "levels=[1,2,4]"],
    "hope-attention": ["model.mixer=attention", "levels=[1,2,4]"],
    "gated-delta": ["model.mixer=gated-delta", "levels=[1,4]"],
    "transformer": ["model.mixer=attention", "levels=[1]"],
}


def losses(family: str, overrides: list[str], steps: int = STEPS) -> list[float]:
    """On a rank of a world: the losses of so many first steps of a family of recipes."""
    config = recipe.load(None, [*COMMON, *FAMILIES[family], *overrides]).config
    with process_groups(config) as layout:
        levels = spectrum(config.levels, BATCH * LENGTH)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        curve = []
        for step in range(steps):
            rows = config.train.micro_batch
            firsts = range(step * BATCH, (step + 1) * BATCH, rows)
            mine = firsts[layout.data_rank :: layout.data_size]
            verdict, _ = trainer.take_step([_micro_batch(first, rows) for first in mine])
            curve.append(verdict.loss)
    return curve


def _micro_batch(first: int, count: int) -> Batch:
    """Sequences to learn from: short patterns, repeated, so that the loss falls in 20 steps."""
    rows = []
    for number in range(first, first + count):
        draw = np.random.default_rng([4711, number])
        pattern = draw.integers(VOCABULARY // 4, size=draw.integers(2, 6))
        rows.append(np.resize(pattern, LENGTH + 1))
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(tokens[:, :-1], tokens[:, 1:], count)


if __name__ == "__main__":
    for name in FAMILIES:
        (curve,) = world.run(1, losses, name, [])
        text = json.dumps({"family": name, "loss": [round(loss, 7) for loss in curve]}, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {curve[0]:.4f} -> {curve[-1]:.4f}")

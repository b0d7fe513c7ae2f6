"""Folders of finished runs as `nlscale train` leaves them, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nlscale.config import recipe
from nlscale.config.curriculum import total_tokens
from nlscale.config.parts import parts_of
from nlscale.config.vocabulary import Config
from nlscale.levels.spectrum import levels_of
from nlscale.model.flops import flops_per_token
from nlscale.model.sizes import level_parameters, non_embedding_parameters

VOCABULARY = 256
SEQUENCE, BATCH = 512, 16


def finished_run(
    folder: Path, steps: int, loss: float, *overrides: str, **replaced: Any
) -> dict[str, Any]:
    """Write config.yaml and summary.json of a small run; returns the summary."""
    config = recipe.load(
        None,
        [
            "data.dir=gone",
            f"data.sequence_length={SEQUENCE}",
            f"train.global_batch={BATCH}",
            "train.micro_batch=2",
            f"train.steps={steps}",
            "model.layers=4",
            "model.d_model=64",
            "model.heads=2",
            f"run.dir={folder}",
            *overrides,
        ],
    ).config
    return finished(folder, config, loss, **replaced)


def finished(folder: Path, config: Config, loss: float, **replaced: Any) -> dict[str, Any]:
    """The same of a configuration."""
    parameters = level_parameters(config, VOCABULARY)
    tokens = total_tokens(config)
    summary = {
        "final_val_loss": loss,
        "tokens": tokens,
        "parameters": sum(parameters),
        "parameters_non_embedding": non_embedding_parameters(config, VOCABULARY),
        "flops": flops_per_token(config, VOCABULARY) * tokens,
        "levels": [
            {
                "name": level.name,
                "parts": [part.value for part in parts_of(config).of_level(level.index)],
                "period_steps": level.period,
                "parameters": count,
            }
            for level, count in zip(levels_of(config), parameters, strict=True)
        ],
        **replaced,
    }
    folder.mkdir(parents=True)
    recipe.write(config, folder / "config.yaml")
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary

"""Small checkpoints with the contents that a run's have, for the tests of commands and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.model.decoder import Decoder
from nlscale.model.layers import megatron_config

SLOW = "blocks.1.cms.mlps.1.up.weight"
"""A parameter of the slow level, whose window is not empty."""
_SIZES = [
    "data.dir=none",
    "data.sequence_length=16",
    "model.layers=2",
    "model.d_model=32",
    "model.heads=2",
    "model.vocabulary=61",
    "model.memory.chunk=4",
    "levels=[1,4]",
    "train.global_batch=8",
]


def config(*overrides: str) -> Config:
    """Of a tiny model of two levels."""
    return recipe.load(None, [*_SIZES, "train.dtype=fp32", *overrides]).config


def contents(seed: int, of: Config | None = None) -> dict[str, Tensor]:
    """Tensors of a run, by name: weights and moments of all, the window of `SLOW`.

    Needs process groups: the shapes are those of a model.
    """
    of = of or config()
    assert of.model.vocabulary is not None
    model = Decoder(of, megatron_config(of), of.model.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in model.named_parameters():
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            made[f"{kind}/{name}"] = torch.randn(parameter.shape, generator=generator)
        if name == SLOW:
            made[f"window/{name}"] = torch.randn(parameter.shape, generator=generator)
    return made


def state(step: int, of: Config | None = None) -> dict[str, Any]:
    """What is saved beside the tensors after that many steps."""
    of = of or config()
    tokens = of.train.global_batch * of.data.sequence_length
    groups = [(0, 0, 1), (1, 0, 4), (1, 2, 4)]
    return {
        "step": step,
        "samples": step * of.train.global_batch,
        "tokens": step * tokens,
        "dropped": 0,
        "dropped_in_a_row": 0,
        "bytes_sent": 0.0,
        "bytes_saved": 0.0,
        "recent": [4.0 - 0.1 * i for i in range(step)],
        "first_loss": 4.0,
        "last_losses": [4.0 - 0.1 * (step - 1)],
        "levels": [
            {
                "level": level,
                "phase": phase,
                "period": period,
                "tokens": (step - phase) % period * tokens,
                "updates": step // period,
                "reductions": step // period,
            }
            for level, phase, period in groups
        ],
        "config": recipe.to_plain(of),
        "data": {"fingerprint": "ab12"},
        "versions": {"python": "3.11.7", "nlscale": "0.1.0", "torch": "2.13.0"},
        "layout": {"ranks": 4, "tensor": 2, "pipeline": 1, "nodes": 2},
        "pending": "canonical",
        "wandb_id": None,
    }


def save(
    run: Path, step: int, tensors: dict[str, Tensor], saved: dict[str, Any] | None = None
) -> Checkpoint:
    """Write a checkpoint of a run, by one process."""
    pieces = [Piece(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in tensors.items()]
    store = Store(run / "checkpoints")
    written = store.write(step, pieces, saved or state(step), None)
    return Checkpoint(written.path, step)

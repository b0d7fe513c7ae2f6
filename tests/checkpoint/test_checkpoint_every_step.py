"""Windows that cross at every step, of optimizers that are spread over the nodes, are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, train
from checkpoint.test_checkpoint_resume import saved_only_at
from torch import Tensor

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint

STEPS, HALF = 3, 2
"""In the middle of a window of the slow level."""
KEYS = [
    "model.layers=1", "data.sequence_length=16", f"train.steps={STEPS}", "train.global_batch=2",
    "levels=[1,3]", "levels.stagger=false", "optimizer.learning_rate=1e-6",
]  # fmt: skip
WAYS = {
    "all": ["parallel.shard_optimizer=all"],
    "matrices": ["parallel.shard_optimizer=matrices", "optimizer.rule=muon"],
}


def windows(of: Checkpoint) -> dict[str, Tensor]:
    found = {}
    for name, info in of.tensors().items():
        if name.startswith("window/"):
            found[name] = torch.empty(info.shape)
            of.read([Piece(name, info.shape, (0,) * len(info.shape), found[name])])
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_window_is_saved_whole_and_the_run_goes_on(tmp_path: Path, way: str) -> None:
    keys = [*KEYS, *WAYS[way], "levels.reduction=every-step"]
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    world.run(2, train, keys, whole, (HALF,), ranks_per_node=1)
    world.run(1, train, [*KEYS, *WAYS[way]], alone, (HALF,))
    found, plain = (windows(checkpoint(folder, HALF)) for folder in (whole, alone))
    assert found.keys() == plain.keys() and found
    for name, values in plain.items():
        assert (found[name] - values).norm() <= 1e-3 * values.norm(), name
    rest = saved_only_at(whole, HALF, tmp_path / "rest")
    world.run(2, train, keys, rest, (), True, ranks_per_node=1)
    result = compare(checkpoint(rest, STEPS), checkpoint(whole, STEPS))
    assert result["bitwise"], result

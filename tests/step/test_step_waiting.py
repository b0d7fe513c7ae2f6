"""The host waits for nothing of a step until all of it is under way."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from levels.level_runs import VOCABULARY, load, sequences
from torch.overrides import TorchFunctionMode

from nlscale.levels.engine import LevelOptimizer, Update
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.consensus import Consensus
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

# Each makes the host wait for the GPU, because it needs the numbers themselves.
WAITS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "equal", "allclose", "is_nonzero", "unique",
    "masked_select", "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Notes who asks for the numbers in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        # A number written into one place of a tensor on a GPU is copied there, which waits; where
        # it goes under a mask it is an argument of the kernel.
        written = name == "__setitem__" and isinstance(args[1], int)
        written = written and not isinstance(args[2], torch.Tensor)
        if name in WAITS or written:
            caller = traceback.extract_stack(limit=2)[0]
            self.seen.append(f"{Path(caller.filename).name}: {caller.line}")
        return function(*args, **kwargs or {})


def waits_of_each_step(overrides: list[str]) -> list[list[str]]:
    """Of six steps; "updated" where everything of the step has been asked for."""
    config = load(["levels=[1,3]", "levels.stagger=false", "train.steps=6", *overrides])
    waits = Waits()
    update = LevelOptimizer.update

    def noted(self: LevelOptimizer, step: int, consensus: Consensus) -> Update:
        under_way = update(self, step, consensus)
        waits.seen.append("updated")
        return under_way

    LevelOptimizer.update = noted  # type: ignore[method-assign]
    found = []
    with process_groups(config) as layout:
        # What megatron-core asks for by itself, in place of what `parallel.cpu` has put there.
        torch.cuda.synchronize = lambda *args: waits.seen.append("synchronize")  # type: ignore
        levels = spectrum(config.levels, tokens_per_step=100)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            waits.seen = []
            with waits:
                trainer.take_step(mine)
            found.append(waits.seen)
    return found


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (4, ["parallel.tensor=2", "levels.reduction=every-step"]),
        (2, ["parallel.pipeline=2", "data.sequence_length=12"]),
        (1, ["data.document_mask=true", "model.mixer=attention"]),
        (2, ["optimizer.rule=m3", "optimizer.m3.every=2", "parallel.shard_optimizer=all"]),
    ],
    ids=["one rank", "tensor ranks of two nodes", "pipeline", "documents", "whole matrices"],
)
def test_the_host_waits_only_when_the_update_is_under_way(ranks: int, overrides: list[str]) -> None:
    read = "transfer.py: return self._values.tolist()"
    for steps in world.run(ranks, waits_of_each_step, overrides, ranks_per_node=max(1, ranks // 2)):
        for step, seen in enumerate(steps, 1):
            # The verdict and the norms; and with the first update of each level, of which every
            # tenth is measured, how far it moved, which is known last.
            reads = 3 if step in (1, 3) else 2
            assert seen == ["updated", *[read] * reads], f"step {step}"

"""Ranks that draw weights together have those of one process that draws them all."""

from __future__ import annotations

import pytest
import torch
import world
from levels.level_runs import VOCABULARY, load

from nlscale.levels.spectrum import spectrum
from nlscale.model.init import initialize
from nlscale.parallel.layout import process_groups
from nlscale.step import draw as module
from nlscale.step.trainer import Trainer


def build(overrides: list[str]) -> tuple[bool, set[str], int]:
    """Whether the weights are what they are to be, what was drawn here, and how many there are."""
    module._LARGE = 500  # some of this model's tensors are smaller
    drawn: list[str] = []
    one_by_one = module.draw

    def noting(parameter: torch.nn.Parameter, name: str, *args: int) -> torch.Tensor:
        drawn.append(name)
        return one_by_one(parameter, name, *args)

    module.draw = noting
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        found = {n: p.detach().clone() for n, p in trainer.named_parameters().items()}
        for stage in trainer.stages:
            initialize(stage, config.run.seed, layout.tensor_rank, layout.tensor_size)
        same = all(torch.equal(found[n], p) for n, p in trainer.named_parameters().items())
        size = layout.tensor_size
        large = [n for n, p in found.items() if p.numel() * size >= module._LARGE]
        return same, set(drawn) & set(large), len(large)


@pytest.mark.parametrize(
    ("ranks", "per_node", "layout"),
    [
        (1, 1, []),
        (4, 2, []),
        (4, 4, ["parallel.tensor=2", "parallel.sequence=true"]),
        (8, 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    ],
)
def test_each_large_tensor_is_drawn_once_in_a_node(
    ranks: int, per_node: int, layout: list[str]
) -> None:
    results = world.run(ranks, build, ["train.dtype=bf16", *layout], ranks_per_node=per_node)
    assert all(same for same, _, _ in results)
    node = results[:per_node]
    drawn = [name for _, names, _ in node for name in names]
    assert len(drawn) == len(set(drawn))
    assert all(names for _, names, _ in node)
    if len(node) == ranks:  # these are all the stages
        assert len(drawn) == node[0][2]

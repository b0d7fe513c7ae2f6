"""Products that add the gradients of weights to megatron-core's fp32 buffers themselves.

Training does so on GPUs; here it is asked for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import world
from levels.level_runs import largest_difference, run_engine

import nlscale.step.trainer
from nlscale.config.vocabulary import Config
from nlscale.model import layers
from nlscale.model.layers import megatron_config

BASE = [
    "model.layers=2",
    "data.sequence_length=16",
    "levels=[1,3]",
    "train.steps=4",
    "optimizer.eps=1e-3",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "sequence, two nodes": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
    "interleaved": (2, ["model.layers=4", "parallel.pipeline=2", "parallel.virtual_stages=2"]),
    "independent, recomputed": (
        2,
        ["parallel.tensor=2", "model.cms=independent", "train.recompute=[cms]"],
    ),
    "overlapped": (2, ["parallel.overlap=true"]),
    "tied": (2, ["parallel.tensor=2", "model.mixer=attention", "model.tie_embeddings=true"]),
}


def run_fused(overrides: list[str]) -> dict[str, Any]:
    """As `run_engine`; `added` counts the gradients that were added, by shape of the weight."""
    added: dict[tuple[int, ...], int] = {}
    add = layers.accumulate_product_

    def count(total: torch.Tensor, d_output: torch.Tensor, x: torch.Tensor) -> None:
        added[tuple(total.shape)] = added.get(tuple(total.shape), 0) + 1
        add(total, d_output, x)

    def fused(config: Config, fuse_accumulation: bool) -> Any:
        assert not fuse_accumulation, "there is no GPU"
        return megatron_config(config, fuse_accumulation=True)

    layers.accumulate_product_ = count
    nlscale.step.trainer.megatron_config = fused  # type: ignore[assignment]
    return {**run_engine(overrides), "added": added}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_the_same(name: str) -> None:
    ranks, layout = LAYOUTS[name]
    nodes = 2 if "two nodes" in name else 1
    (plain, *_), (fused, *_) = (
        world.run(ranks, run, [*BASE, *layout], ranks_per_node=ranks // nodes)
        for run in (run_engine, run_fused)
    )
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert largest_difference(fused["parameters"], plain["parameters"]) <= 1e-6


def test_every_product_of_a_weight_adds_its_gradient_itself() -> None:
    (result,) = world.run(1, run_fused, BASE)
    # Four micro batches in each of four steps; two products in each of two mixers, two in each
    # of two MLPs of two layers, and the head.
    matrices = [p for n, p in result["parameters"].items() if p.dim() == 2 and "embed" not in n]
    products = {tuple(p.shape) for p in matrices}
    assert set(result["added"]) <= products
    assert sum(result["added"].values()) == 4 * 4 * (2 * (2 + 2 * 2) + 1)

"""State in host memory makes the updates of state on the device, to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import world
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient, whole_parameters

from nlscale.levels.optimizers import main_parameters
from nlscale.levels.spectrum import levels_of
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

BASE = ["data.sequence_length=8", "train.steps=11", "train.global_batch=2", "model.layers=2"]
LEVELS = "levels=[{period: 1, memory: %s}, {period: 4, memory: %s, optimizer: {rule: %s}}]"


def trained(overrides: list[str], spoils: tuple[int, ...] = ()) -> dict[str, Any]:
    """On a rank of a world: what a run is, to the bit; and what its tiers hold."""
    config = load([*BASE, *overrides])
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        losses, told = [], []
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            bad = step in spoils and layout.rank == layout.world - 1
            with spoiled_gradient(trainer.stages[-1]) if bad else nullcontext():
                verdict, updated = trainer.take_step(mine)
            losses.append(verdict.loss)
            told.append(updated)
        tiers = [g.optimizer.tier for g in trainer.optimizer.groups]
        state = {
            f"{kind}/{shard.name}/{shard.start}": tensor.detach().clone()
            for shard in trainer.shards()
            for kind, tensor in {"weights": shard.weights, **shard.state()}.items()
        }
        return {
            "losses": losses,
            "told": told,
            "state": state,
            "parameters": whole_parameters(trainer),
            "different": trainer.optimizer.replica_difference(trainer.named_parameters()),
            "host": sum(tier.nbytes for tier in tiers if tier is not None),
            "mains": sum(
                p.numel()
                for g, tier in zip(trainer.optimizer.groups, tiers, strict=True)
                if tier is not None
                for p in main_parameters(g)
            ),
        }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert repr(one["losses"]) == repr(other["losses"])
    for kind in ("state", "parameters"):
        assert one[kind].keys() == other[kind].keys()
        for name, tensor in one[kind].items():
            assert torch.equal(tensor, other[kind][name]), name


@pytest.mark.parametrize(
    ("ranks", "dtype", "rule", "more", "spoils"),
    [
        (1, "bf16", "adamw", [], ()),
        (1, "fp32", "sgd", ["optimizer.betas_by_period=true"], (4,)),
        (2, "fp32", "adamw", ["checkpoint.pending=exact"], (5, 8)),
        (2, "bf16", "adamw", ["parallel.shard_optimizer=all"], (8,)),
        (2, "fp32", "adamw", ["parallel.tensor=2"], ()),
    ],
)
def test_host_is_hbm_to_the_bit(
    ranks: int, dtype: str, rule: str, more: list[str], spoils: tuple[int, ...]
) -> None:
    per_node = 2 if "parallel.tensor=2" in more else 1
    hbm, host = (
        world.run(
            ranks,
            trained,
            [LEVELS % (*where, rule), f"train.dtype={dtype}", "tiers.ring_mib=0.0625", *more],
            spoils,
            ranks_per_node=per_node,
        )
        for where in (("hbm", "hbm"), ("host", "host"))
    )
    kept = 2 if rule == "adamw" else None
    for one, other in zip(hbm, host, strict=True):
        assert_same(one, other)
        assert one["different"] is other["different"] is None
        for mine, theirs in zip(one["told"], other["told"], strict=True):
            assert mine.keys() == theirs.keys()
            for level, numbers in mine.items():  # ratios are sums over other pieces
                assert numbers == pytest.approx(theirs[level], rel=1e-5)
        assert one["host"] == 0 < other["host"]
        if kept is not None:
            assert other["host"] == 4 * (1 + kept) * other["mains"]

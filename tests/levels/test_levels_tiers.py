"""State in host memory makes the updates of state on the device, to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient, whole_parameters
from ops.plain_ops import stand_in

from nlscale.errors import UserError
from nlscale.levels.optimizers import main_parameters
from nlscale.levels.ring_pieces import check_tiers
from nlscale.levels.spectrum import levels_of
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

BASE = ["data.sequence_length=8", "train.steps=11", "train.global_batch=2", "model.layers=2"]
LEVELS = "levels=[{period: 1, memory: %s}, {period: 4, memory: %s, optimizer: {rule: %s}}]"


def trained(overrides: list[str], spoils: tuple[int, ...] = ()) -> dict[str, Any]:
    """On a rank of a world: what a run is, to the bit; and what its tiers hold."""
    stand_in()
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


NVME = "levels=[{period: 1, memory: %s}, {period: 3, memory: %s}, {period: 4, memory: %s}]"


@pytest.mark.parametrize(
    ("ranks", "more", "spoils"),
    [
        (1, ["train.dtype=bf16", "model.layers=3"], (4,)),
        (2, ["train.dtype=fp32", "parallel.shard_optimizer=all"], (8, 9)),
        (4, ["train.dtype=bf16", "parallel.tensor=2", "train.steps=9"], (5, 8)),
    ],
)
def test_nvme_is_hbm_to_the_bit(
    ranks: int, more: list[str], spoils: tuple[int, ...], tmp_path: Path
) -> None:
    """On one and two nodes, with drops, and windows that the end cuts short."""
    given = ["tiers.ring_mib=0.0625", f"tiers.folder={tmp_path}", "tiers.threads=2", *more]
    per_node = 2 if "parallel.tensor=2" in more else 1
    hbm, nvme = (
        world.run(ranks, trained, [NVME % where, *given], spoils, ranks_per_node=per_node)
        for where in (("hbm",) * 3, ("nvme", "host", "nvme"))
    )
    for one, other in zip(hbm, nvme, strict=True):
        assert_same(one, other)
        assert one["different"] is other["different"] is None
        assert one["host"] == 0 < other["host"] and other["host"] == 12 * other["mains"]
    assert not [*tmp_path.iterdir()]


CPU = "levels=[{period: 1}, {period: 4, memory: host, update: %s}]"


@pytest.mark.parametrize(
    ("dtype", "within", "more"),
    [("fp32", 1e-6, ["optimizer.betas_by_period=true"]), ("bf16", 0, ["parallel.tensor=2"])],
)
def test_updates_on_the_host_are_those_of_the_device_within_a_millionth(
    dtype: str, within: float, more: list[str]
) -> None:
    given = [f"train.dtype={dtype}", "optimizer.warmup_steps=0", *more]
    device, cpu = (
        world.run(2, trained, [CPU % by, *given], (8,), ranks_per_node=2 if not within else 1)
        for by in ("device", "cpu")
    )
    for one, other in zip(device, cpu, strict=True):
        assert other["different"] is None
        if within:  # in bf16 a weight that is rounded the other way makes other gradients
            for kind in ("state", "parameters"):
                for name, tensor in one[kind].items():
                    torch.testing.assert_close(tensor, other[kind][name], rtol=1e-6, atol=1e-6)
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-6, nan_ok=True)
        else:
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
        for mine, theirs in zip(one["told"], other["told"], strict=True):
            assert mine.keys() == theirs.keys()
            for level, numbers in mine.items():
                assert numbers == pytest.approx(theirs[level], rel=1e-4 if within else 0.1)


def test_what_the_host_cannot_update_is_refused_with_a_way_out() -> None:
    for keys, said in (
        (["levels=[{period: 1, update: cpu}]"], "0.memory=host, or update=device"),
        ([CPU % "cpu", "optimizer.rule=sgd"], "under adamw alone; use .*rule: adamw"),
    ):
        with pytest.raises(UserError, match=said):
            check_tiers(load([*BASE, *keys]))

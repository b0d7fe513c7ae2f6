"""Optimizer state that is spread over the nodes makes the same updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import world
from levels.level_runs import (
    VOCABULARY,
    largest_difference,
    load,
    run_engine,
    run_oracle,
    sequences,
)
from levels.test_levels_engine import LAYOUTS, PADDING, TOLERANCE, random_run

from nlscale.levels.optimizers import main_parameters
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

ALL = "parallel.shard_optimizer=all"


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (4, 1), (6, 2)])
def test_it_gives_what_a_plain_single_process_gives(ranks: int, per_node: int) -> None:
    overrides = random_run(seed=7 * ranks + per_node)
    if ranks == 6:  # three nodes, into which no vector is cut evenly
        overrides.append("train.global_batch=6")
    results = world.run(ranks, run_engine, [*overrides, ALL], ranks_per_node=per_node)
    (oracle,) = world.run(1, run_oracle, overrides)
    assert results[0]["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE
    for step in range(len(oracle["losses"])):
        assert len({r["hashes"][step] for r in results}) == 1, f"nodes differ at step {step + 1}"


@pytest.mark.parametrize("layout", ["sequence parallel, two nodes", "all at once"])
def test_steps_are_dropped_exactly(layout: str) -> None:
    ranks, per_node, overrides = LAYOUTS[layout]
    overrides = [*overrides, "data.sequence_length=16", "levels=[1,2,5]"]
    overrides += ["train.steps=7", "train.global_batch=4", "optimizer.eps=1e-3"]
    dropped = [4, 6, 7]  # a window closes, in the middle of one, the last
    spoil = {step: ranks - 1 for step in dropped}
    results = world.run(ranks, run_engine, [*overrides, ALL], spoil, ranks_per_node=per_node)
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (oracle,) = world.run(1, run_oracle, alone, frozenset(dropped))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == dropped
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bytes_are_those_of_sums_and_of_updated_parameters(dtype: str) -> None:
    overrides = ["levels=[1,3]", "levels.stagger=false", "train.steps=6", f"train.dtype={dtype}"]
    node, every = (
        world.run(3, run_engine, [*overrides, *more], ranks_per_node=1) for more in ([], [ALL])
    )
    share = {"fp32": 1.0, "bf16": 0.75}[dtype]
    assert sum(every[0]["bytes_by_step"]) == pytest.approx(share * sum(node[0]["bytes_by_step"]))
    assert every[0]["sent"] == pytest.approx(sum(every[0]["bytes_by_step"]), rel=PADDING)


def test_half_the_bytes_are_within_rounding_and_the_same_on_all_nodes() -> None:
    overrides = ["levels=[1,3]", "levels.stagger=false", "train.steps=6", ALL]
    exact, half = (
        world.run(3, run_engine, [*overrides, f"levels.spectrum.1.wire={wire}"], ranks_per_node=1)
        for wire in ("fp32", "bf16")
    )
    for step in range(6):
        assert len({r["hashes"][step] for r in half}) == 1, f"nodes differ at step {step + 1}"
    difference = largest_difference(half[0]["parameters"], exact[0]["parameters"])
    # One rounding to 8 bits of each node's gradient; Adam makes of it as much of an update.
    assert 0 < difference <= 2**-8 * 6 * 1e-3 / 0.02
    fewer = sum(exact[0]["bytes_by_step"]) - sum(half[0]["bytes_by_step"])
    assert exact[0]["sent"] - half[0]["sent"] == pytest.approx(fewer, rel=PADDING) and fewer > 0


def held(overrides: list[str]) -> tuple[int, int, Any]:
    """Elements of the model and of what updates it on this rank; what differs between replicas."""
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        trainer.take_step(sequences(config, 1)[layout.data_rank :: layout.data_size])
        mains = [p for g in trainer.optimizer.groups for p in main_parameters(g)]
        named: dict[str, Any] = trainer.named_parameters()
        different = trainer.optimizer.replica_difference(named)
        return sum(p.numel() for p in named.values()), sum(p.numel() for p in mains), different


def test_each_rank_holds_a_share_of_it() -> None:
    # each node one data-parallel rank: of two tensor-parallel ranks
    keys = ["parallel.tensor=2", "train.dtype=bf16", "levels=[1,2]"]
    for sharding, nodes in (("node", 1), ("all", 3)):
        overrides = [*keys, "train.global_batch=6", f"parallel.shard_optimizer={sharding}"]
        results = world.run(6, held, overrides, ranks_per_node=2)
        for parameters, own, different in results:
            assert own <= math.ceil(1.1 * parameters / nodes)
            assert different is None
        assert sum(own for _, own, _ in results) == 6 / nodes * results[0][0]

"""Outer steps, and levels whose nodes go their own ways between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import world
from levels.level_runs import (
    VOCABULARY,
    _hash,
    largest_difference,
    load,
    run_engine,
    sequences,
    whole_parameters,
)
from levels.plain_outer import run_plain
from levels.test_levels_engine import LAYOUTS, PADDING, TOLERANCE

from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.plan.traffic import traffic
from nlscale.step.micro_batches import LossMask
from nlscale.step.trainer import Trainer

SHORT = ["data.sequence_length=16", "train.global_batch=4", "model.layers=2"]
LOCAL = "levels.spectrum.{}.local=true"
EVERY = "levels.spectrum.{}.outer.every={}"


def local(level: int, every: int, *more: str) -> list[str]:
    """Overrides that make a level local."""
    own = [f"levels.spectrum.{level}.outer.{key}" for key in more]
    return [LOCAL.format(level), EVERY.format(level, every), *own]


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2)])
def test_one_update_by_sgd_before_each_outer_step_is_data_parallel(
    ranks: int, per_node: int
) -> None:
    # Sequences differ in length, so that nodes have gradients of different numbers of targets.
    shared = ["levels=[1,2]", "train.steps=7", "optimizer.rule=sgd", "optimizer.clip=0"]
    shared += ["optimizer.learning_rate=0.5", "model.layers=2", "train.global_batch=8"]
    plain = ["learning_rate=1", "momentum=0"]
    both = [*local(0, 1, *plain), *local(1, 1, *plain)]
    exact = world.run(ranks, run_engine, shared, ranks_per_node=per_node)
    apart = world.run(ranks, run_engine, [*shared, *both], ranks_per_node=per_node)
    assert exact[0]["losses"][-1] < exact[0]["losses"][0] - 0.02, "it must move to be a comparison"
    assert apart[0]["losses"] == pytest.approx(exact[0]["losses"], rel=1e-6)
    for mine, theirs in zip(exact, apart, strict=True):
        difference = largest_difference(theirs["parameters"], mine["parameters"])
        assert difference <= TOLERANCE


DILOCO = {
    "all of the model, together": (
        2,
        1,
        ["levels=[1]", "levels.stagger=false", *local(0, 3)],
    ),
    "three nodes, by depth": (
        3,
        1,
        ["levels=[1]", "train.global_batch=6", *local(0, 3, "momentum=0.8")],
    ),
    "a slow level beside one that is not local": (
        2,
        2,
        ["levels=[1,2]", "optimizer.clip=0.05", *local(1, 2, "learning_rate=0.4")],
    ),
    "clipped together": (
        2,
        1,
        [
            "levels=[1,2]",
            "levels.reduction=every-step",
            "optimizer.clip=0.05",
            "optimizer.clip_scope=joint",
            *local(1, 3),
        ],
    ),
    "whole matrices, whose owners are ranks of a node": (
        2,
        2,
        [
            "levels=[1]",
            "optimizer.rule=muon",
            "optimizer.eps=1e-3",
            "model.init_std=0.1",
            *local(0, 3),
        ],
    ),
}


@pytest.mark.parametrize("case", DILOCO)
def test_nodes_that_go_their_own_ways_do_as_a_plain_process_that_plays_them(case: str) -> None:
    """With steps that are dropped, at an outer step too, and a period that the end cuts short."""
    nodes, per_node, overrides = DILOCO[case]
    overrides = ["model.layers=2", "train.steps=8", *overrides]
    dropped = [3, 4, 6]  # an outer step that follows no update of its own, within a period
    spoil = dict.fromkeys(dropped, nodes * per_node - 1)
    results = world.run(nodes * per_node, run_engine, overrides, spoil, ranks_per_node=per_node)
    (plain,) = world.run(1, run_plain, overrides, nodes, per_node, frozenset(dropped))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == dropped
    assert results[0]["losses"][-1] == pytest.approx(plain["losses"][-1], rel=1e-5)
    for result in results:  # the last outer step makes one model of all
        difference = largest_difference(result["parameters"], plain["parameters"][0])
        assert difference <= TOLERANCE


def test_outer_steps_count_the_updates_of_periods_that_change() -> None:
    overrides = ["levels=[1,4]", "levels.stagger=false", "model.layers=2", "train.steps=10"]
    overrides += ["levels.period_warmup.steps=6 steps", EVERY.format(0, 3), *local(1, 2)]
    found = world.run(2, run_engine, overrides, ranks_per_node=1)
    # Periods of at most 1, 2 and 4 steps from steps 1, 4 and 7 on; so outer steps at 2, 4 and 8.
    (plain,) = world.run(1, run_plain, overrides, 2, 1, frozenset(), {1: [1, 2, 3, 4, 6, 8]})
    assert found[0]["counts"] == [(10, 10), (7, 4)]
    assert found[0]["losses"][-1] == pytest.approx(plain["losses"][-1], rel=1e-5)
    assert largest_difference(found[1]["parameters"], plain["parameters"][0]) <= TOLERANCE


OUTER_ALONE = {
    "one rank": (1, 1, []),
    "two nodes, optimizer state over both": (2, 1, ["parallel.shard_optimizer=all"]),
    **LAYOUTS,
}


@pytest.mark.parametrize("layout", OUTER_ALONE)
def test_outer_steps_of_levels_that_are_not_local_are_exact_in_every_layout(layout: str) -> None:
    ranks, per_node, overrides = OUTER_ALONE[layout]
    layers = "model.layers=4" if "interleaved" in layout else "model.layers=2"
    overrides = [*SHORT, layers, *overrides, "levels=[1,2]", "train.steps=7"]
    overrides += [EVERY.format(0, 3), EVERY.format(1, 2), "levels.spectrum.1.outer.momentum=0.5"]
    dropped = [3, 7]  # an outer step of the first level, and the last
    spoil = dict.fromkeys(dropped, ranks - 1)
    results = world.run(ranks, run_engine, overrides, spoil, ranks_per_node=per_node)
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == dropped
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (plain,) = world.run(1, run_plain, alone, 1, 1, frozenset(dropped))
    for result in results:
        difference = largest_difference(result["parameters"], plain["parameters"][0])
        assert difference <= TOLERANCE
    if layout == "two nodes, optimizer state over both":  # updated parameters cross once a step
        assert results[0]["sent"] == pytest.approx(sum(results[0]["bytes_by_step"]), rel=PADDING)


def watched(overrides: list[str]) -> list[tuple[bool, str, str | None, str | None]]:
    """Train on this rank of a world.

    Returns:
        Of each step: whether all groups have just made an outer step; a hash of the parameters;
        what the comparison of replicas finds; and what it finds after one element has changed.
    """
    config = load(overrides)
    found = []
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        named: Any = trainer.named_parameters()
        for step in range(1, config.train.steps + 1):
            trainer.take_step(sequences(config, step)[layout.data_rank :: layout.data_size])
            joined = not any(p.outer_updates for p in trainer.optimizer.progress.values())
            before = trainer.optimizer.replica_difference(named)
            changed = named["head.weight"].data[0, :1]
            kept = changed.clone()
            changed += 1e-3 * (layout.rank == layout.world - 1)
            after = trainer.optimizer.replica_difference(named)
            changed.copy_(kept)
            found.append((joined, _hash(trainer), before, after))
    return found


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4"])
def test_nodes_differ_between_outer_steps_and_are_the_same_bits_after_them(wire: str) -> None:
    overrides = ["levels=[1]", "levels.stagger=false", "train.steps=7", *local(0, 3), *SHORT[2:]]
    dtype = "bf16" if wire == "bf16" else "fp32"
    overrides += [f"levels.spectrum.0.wire={wire}", f"train.dtype={dtype}"]
    ranks = world.run(4, watched, overrides, ranks_per_node=2)
    for step, of_ranks in enumerate(zip(*ranks, strict=True), 1):
        joined, hashes, before, after = zip(*of_ranks, strict=True)
        assert set(joined) == {step in (3, 6, 7)}
        assert hashes[0] == hashes[1] and hashes[2] == hashes[3], "ranks of a node differ"
        assert (hashes[0] == hashes[2]) == (step in (3, 6, 7))
        assert set(before) == {None}
        # A node of one's own is compared too: its other rank sees it, and others after outer steps.
        seen = [False, False, True, True] if step not in (3, 6, 7) else [True] * 4
        assert [found == "head.weight" for found in after] == seen


def spoiled_outer(overrides: list[str]) -> dict[str, tuple[bool, str | None]]:
    """Train this rank of a world for three steps.

    Returns:
        By what the last rank has changed of one sync group: whether that was between two outer
        steps of it; and what the comparison of replicas finds.
    """
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        named: Any = trainer.named_parameters()
        for step in range(1, 4):
            trainer.take_step(sequences(config, step)[layout.data_rank :: layout.data_size])
        assert trainer.optimizer.replica_difference(named) is None
        found = {}
        for group, outer in trainer.optimizer.following.outers.items():
            between = trainer.optimizer.progress[group].outer_updates > 0
            for what, kept in [("weights", outer.before), ("momentum", outer.momentum)]:
                values = next(iter(kept.values())).view(-1)[:1]
                before = values.clone()
                values += 1e-3 * (layout.rank == layout.world - 1)
                different = trainer.optimizer.replica_difference(named)
                found[f"{what} {group.level} {group.outer_phase}"] = between, different
                values.copy_(before)
        return found


def test_what_outer_steps_go_on_from_is_compared_between_nodes_at_any_time() -> None:
    overrides = ["levels=[1]", "train.steps=9", *local(0, 4), *SHORT]
    for found in world.run(2, spoiled_outer, overrides, ranks_per_node=1):
        # Of two blocks the second makes its outer steps with updates 2, 6 and so on.
        assert {key: between for key, (between, _) in found.items()} == {
            "weights 0 0": True, "momentum 0 0": True, "weights 0 2": True, "momentum 0 2": True,
        }  # fmt: skip
        for key, (_, different) in found.items():
            what, level, outer_phase = key.split()
            of = f"level {level} phase 0" + " outer phase 2" * (outer_phase == "2")
            assert different == f"outer {what} of the optimizer, {of}, shard 0"


@pytest.mark.parametrize("layout", ["sequence parallel, two nodes", "pipeline over two nodes"])
def test_a_local_level_in_every_layout_sends_what_is_planned(layout: str) -> None:
    ranks, per_node, overrides = LAYOUTS[layout]
    overrides = [*SHORT, *overrides, "levels=[1,2]", "train.steps=8", *local(1, 2)]
    results = world.run(ranks, run_engine, overrides, ranks_per_node=per_node)
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (plain,) = world.run(1, run_plain, alone, 2)
    difference = largest_difference(results[0]["parameters"], plain["parameters"][0])
    assert difference <= TOLERANCE
    sent = results[0]["bytes_by_step"]
    fast = min(sent)  # which the first level sends at every step
    # two blocks, each once in four steps, and both at the end
    assert [round((more - fast) / (max(sent) - fast), 6) for more in sent] == [
        0,
        0.5,
        0,
        0.5,
        0,
        0.5,
        0,
        1,
    ]
    if "tensor" not in str(overrides):  # of which each rank sends the norms, much of this model
        assert results[0]["sent"] == pytest.approx(sum(sent), rel=PADDING)
    if "pipeline" not in str(overrides):
        config = load(overrides)
        planned = traffic(config, spectrum(config.levels, 100), VOCABULARY, 2)
        assert sum(sent) == pytest.approx(planned.run_per_level.sum())
    # the second block at steps 2, 6 and 8
    assert results[0]["counts"] == [(8, 8), (4, 3)]


def without_targets(overrides: list[str]) -> dict[str, Any]:
    """Train where none of the targets of the second node counts; the parameters."""
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[:2]
            if layout.rank == 1:
                none = [np.zeros(batch.tokens.shape, dtype=bool) for batch in mine]
                masks = [LossMask.of(each, 1, layout.device) for each in none]
                mine = [b._replace(mask=m) for b, m in zip(mine, masks, strict=True)]
            trainer.take_step(mine)
        return whole_parameters(trainer)


def test_a_node_that_has_counted_no_target_has_no_say() -> None:
    overrides = ["levels=[1]", "train.steps=6", *local(0, 3), *SHORT[1:]]
    both = world.run(2, without_targets, overrides, ranks_per_node=1)
    (alone,) = world.run(1, without_targets, overrides)
    assert largest_difference(both[1], alone) <= TOLERANCE

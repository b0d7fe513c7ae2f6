"""The nested form of CMS: copies of the MLPs, and what they are set to at the ends of windows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import world
from levels.level_runs import (
    VOCABULARY,
    _hash,
    largest_difference,
    load,
    run_engine,
    sequences,
    spoiled_gradient,
    whole_parameters,
)
from levels.plain_nested import run_plain
from levels.test_levels_engine import TOLERANCE

from nlscale.levels.spectrum import Copy, Level, levels_of, sync_group
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

NESTED = [
    "model.cms=nested",
    "model.mixer=attention",
    "model.layers=2",
    "model.hidden=32",
    "optimizer.clip=0",
    "data.sequence_length=16",
]
THREE = [
    *NESTED,
    "levels=[2,4,8]",
    "levels.spectrum.1.copy_rate=0.8",
    "levels.spectrum.2.copy_rate=0.3",
    "train.steps=17",
]
DROPPED = [4, 8, 11, 17]
"""In the first block: ends of a window of the first copy, of both, a step within one; the last."""


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    (found,) = world.run(1, run_plain, THREE, frozenset(DROPPED))
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("ranks", "per_node", "overrides"),
    [
        (1, 1, []),
        (2, 1, ["parallel.shard_optimizer=all"]),
        (2, 2, ["parallel.tensor=2"]),
        (2, 1, ["parallel.pipeline=2", "levels.reduction=every-step"]),
    ],
)
def test_training_with_copies_is_the_plain_loop_in_every_layout(
    plain: dict[str, Any], ranks: int, per_node: int, overrides: list[str]
) -> None:
    spoil = dict.fromkeys(DROPPED, ranks - 1)
    results = world.run(ranks, run_engine, [*THREE, *overrides], spoil, ranks_per_node=per_node)
    for result in results:
        assert [i + 1 for i, ok in enumerate(result["admitted"]) if not ok] == DROPPED
        assert largest_difference(result["parameters"], plain["parameters"]) <= TOLERANCE
        # copies move without a gradient, and cross no link
        assert [made for made, _ in result["counts"][1:]] == plain["moved"] == [4, 2]
        assert [crossed for _, crossed in result["counts"][1:]] == [0, 0]
    assert results[0]["losses"][-1] == pytest.approx(plain["losses"][-1], rel=1e-5)


def train_each(
    runs: list[list[str]], dropped: list[int]
) -> list[tuple[list[tuple[str, str | None]], dict[str, Any]]]:
    """Train runs one after the other on this rank of a world.

    Returns:
        Of each: of each step a hash of the parameters and what the comparison of replicas finds;
        and the parameters at the end.
    """
    found = []
    for overrides in runs:
        config, steps = load(overrides), []
        with process_groups(config) as layout:
            trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
            named: Any = trainer.named_parameters()
            for step in range(1, config.train.steps + 1):
                mine = sequences(config, step)[layout.data_rank :: layout.data_size]
                spoils = step in dropped and layout.rank == layout.world - 1
                with spoiled_gradient(trainer.stages[-1]) if spoils else nullcontext():
                    trainer.take_step(mine)
                steps.append((_hash(trainer), trainer.optimizer.replica_difference(named)))
            found.append((steps, whole_parameters(trainer)))
    return found


def test_a_rate_of_one_moves_nothing_and_less_does(plain: dict[str, Any]) -> None:
    """What the comparison above is worth: copies change a run by far more than its tolerance."""
    idle = [f"levels.spectrum.{level}.copy_rate=1" for level in (1, 2)]
    alone = [own for own in THREE if "copy_rate" not in own]
    (((_, moved), (_, never)),) = world.run(
        1, train_each, [[*THREE, *idle], [*alone, "levels=[2]"]], DROPPED
    )
    assert largest_difference(moved, never) <= TOLERANCE
    assert largest_difference(plain["parameters"], never) > 100 * TOLERANCE


PARTS = "{name: rest, parts: [mixer, embedding, head, norms]}"
OUTER = "{name: mlp, period: 2, parts: [cms], outer: {every: 3, momentum: 0, learning_rate: 0.6}}"
COPIED = "{name: mlp, period: 2, parts: [cms]}, {name: slow, period: 6, copy_rate: 0.6}"


def test_one_copy_is_an_outer_step_without_momentum_to_the_bit() -> None:
    """In bf16 on two nodes, with blocks of other phases, windows that a dropped step ends, and one
    that the end of the run cuts short."""
    shared = [*NESTED, "train.steps=10", "train.dtype=bf16"]
    outer = [*shared, "model.cms=sequential", f"levels=[{PARTS},{OUTER}]"]
    nested = [*shared, f"levels=[{PARTS},{COPIED}]"]
    ranks = world.run(2, train_each, [outer, nested], [5, 6], ranks_per_node=1)
    for (steps, _), (theirs, _) in ranks:
        assert steps == theirs
        assert {difference for _, difference in steps} == {None}
        assert len({found for found, _ in steps}) > 5


def test_a_copy_that_differs_between_nodes_is_found_and_a_frozen_one_stands_still() -> None:
    overrides = [*NESTED, "levels=[1,2]", "train.steps=2"]
    for before, after, moved, back in world.run(2, handled, overrides, ranks_per_node=1):
        assert before is None
        assert after is not None and after.startswith("copy at level 1 of the optimizer")
        assert moved and back


def handled(overrides: list[str]) -> tuple[str | None, str | None, bool, bool]:
    """On this rank of a world, after a step: what the comparison of replicas finds before and after
    the last rank has changed an element of a copy; whether MLPs have moved then, and whether they
    are what they began as after the next step, at which copies move, with their level frozen."""
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        named: Any = trainer.named_parameters()
        mlps = [p for name, p in named.items() if "mlps" in name]
        begun = [p.detach().clone() for p in mlps]
        trainer.take_step(sequences(config, 1)[layout.data_rank :: layout.data_size])
        moved = not any(map(torch.equal, mlps, begun))
        before = trainer.optimizer.replica_difference(named)
        changed = next(shard.copies[1] for shard in trainer.shards() if shard.copies).view(-1)[:1]
        kept = changed.clone()
        changed += 1e-3 * (layout.rank == layout.world - 1)
        after = trainer.optimizer.replica_difference(named)
        changed.copy_(kept)
        trainer.optimizer.added.frozen = {1}
        trainer.take_step(sequences(config, 2)[layout.data_rank :: layout.data_size])
        return before, after, moved, all(map(torch.equal, mlps, begun))


def test_windows_of_copies_are_so_many_windows_of_what_they_copy() -> None:
    for layers, own, ratios in ((1, 1, (2, 3)), (3, 1, (4, 4)), (4, 4, (2, 8)), (5, 3, (3, 2))):
        trained = Level(0, "mlp", own, 1.0)
        slow = Level(1, "slow", own * ratios[0], 1.0, copy=Copy(own, 0.5))
        slower = Level(2, "slower", own * ratios[0] * ratios[1], 1.0, copy=Copy(own, 0.5))
        for depth in range(layers):
            steps = range(1, 10 * slower.period)
            due = [
                [step for step in steps if sync_group(level, depth, layers, True).due(step)]
                for level in (trained, slow, slower)
            ]
            assert due[1] == due[0][ratios[0] - 1 :: ratios[0]]
            assert due[2] == due[1][ratios[1] - 1 :: ratios[1]]
            assert len(due[2]) > 5

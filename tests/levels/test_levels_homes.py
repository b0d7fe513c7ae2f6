"""Matrices that lie whole on a node: where, what that sends, and that it loses nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import world
from levels.level_runs import largest_difference, run_engine
from levels.test_levels_engine import PADDING
from levels.test_levels_sharding import held

from nlscale.levels.homes import cut_at_homes

MATRICES = "parallel.shard_optimizer=matrices"
RUN = [
    "model.layers=2", "levels=[1,2]", "levels.stagger=false", "data.sequence_length=16",
    "train.global_batch=2", "train.steps=4", "optimizer.rule=muon",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_shard_is_cut_at_homes_and_the_rest_evenly(seed: int) -> None:
    draw = random.Random(seed)
    nodes, at = draw.randint(1, 5), draw.randint(0, 3)
    places, owner = [], dict[int, int | None]()
    for _ in range(draw.randint(0, 8)):
        first, last = at, at + draw.randint(1, 9)
        home = draw.choice([None, draw.randrange(nodes)])
        places.append((first, last, home))
        owner |= dict.fromkeys(range(first, last), home)
        at = last + draw.randint(0, 2)  # padding
    begin = draw.randint(0, 6)
    end = begin + draw.randint(0, at + 3)
    cut = cut_at_homes(places, begin, end, nodes)
    has = [i for mine in cut for each in mine for i in range(begin + each.start, begin + each.stop)]
    assert sorted(has) == list(range(begin, end)), "each element lies on one node"
    runs: list[list[int]] = [[]]
    for i in range(begin, end):  # what lies between matrices, maximal
        if owner.get(i) is None:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    for node, mine in enumerate(cut):
        here = {i for each in mine for i in range(begin + each.start, begin + each.stop)}
        assert {i for i in range(begin, end) if owner.get(i) not in (None, node)}.isdisjoint(here)
        for run in runs:
            part, last = len(run) // nodes, node == nodes - 1
            assert len(here & {*run}) == part + last * (len(run) % nodes)
        for first, stop, _ in places:
            of_it = sorted(here & {*range(first, stop)})
            assert of_it == list(range(of_it[0], of_it[-1] + 1)) if of_it else True, "one range"


def test_in_bf16_it_sends_a_quarter_less_and_loses_nothing() -> None:
    keys = [*RUN, "train.dtype=bf16", "optimizer.clip=0"]
    node, homes = (
        world.run(2, run_engine, [*keys, *more], ranks_per_node=1) for more in ([], [MATRICES])
    )
    # The sum of two gradients is the same on every node, and so is the update to the bit.
    assert homes[0]["hashes"] == homes[1]["hashes"] == node[0]["hashes"]
    assert homes[0]["losses"] == node[0]["losses"]
    planned = sum(homes[0]["bytes_by_step"])
    assert planned == pytest.approx(0.75 * sum(node[0]["bytes_by_step"]))
    assert homes[0]["sent"] == pytest.approx(planned, rel=PADDING)


def test_a_level_that_crosses_in_bf16_is_within_rounding_on_three_nodes() -> None:
    keys = [*RUN, MATRICES, "train.global_batch=3"]
    exact, half = (
        world.run(3, run_engine, [*keys, f"levels.spectrum.1.wire={wire}"], ranks_per_node=1)
        for wire in ("fp32", "bf16")
    )
    assert len({tuple(result["hashes"]) for result in half}) == 1
    assert 0 < largest_difference(half[0]["parameters"], exact[0]["parameters"]) <= 1e-2
    fewer = sum(exact[0]["bytes_by_step"]) - sum(half[0]["bytes_by_step"])
    assert exact[0]["sent"] - half[0]["sent"] == pytest.approx(fewer, rel=PADDING) and fewer > 0


def test_each_node_holds_a_share() -> None:
    keys = [*RUN, MATRICES, "train.dtype=bf16", "train.global_batch=4"]
    results: list[tuple[int, int, Any]] = world.run(4, held, keys, ranks_per_node=2)
    nodes = [results[0][1] + results[1][1], results[2][1] + results[3][1]]
    parameters = results[0][0]
    assert sum(nodes) == parameters and max(nodes) <= 0.55 * parameters
    assert all(different is None for _, _, different in results)


@pytest.mark.parametrize(
    ("ranks", "per_node", "more"),
    [
        (6, 3, ["train.global_batch=6"]),
        (4, 1, ["model.cms=independent", "train.global_batch=4"]),
    ],
)
def test_a_rank_that_has_nothing_of_a_group_takes_part(
    ranks: int, per_node: int, more: list[str]
) -> None:
    wide = ["model.layers=2", "model.d_model=64", "model.hidden=128", "levels=[1,2]"]
    keys = [*wide, "data.sequence_length=16", "train.steps=4", "optimizer.rule=muon", *more]
    homes, parts = (
        world.run(ranks, run_engine, [*keys, way], ranks_per_node=per_node)
        for way in (MATRICES, "parallel.shard_optimizer=all")
    )
    assert len({tuple(result["hashes"]) for result in homes}) == 1
    assert homes[0]["losses"] == pytest.approx(parts[0]["losses"], rel=1e-6)

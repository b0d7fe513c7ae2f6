"""Every optimizer rule is its equation, on any layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import world
from levels.level_runs import largest_difference, run_engine
from levels.plain_rules import run_plain
from levels.test_levels_engine import PADDING

# Sums in another order, through as many updates.
TOLERANCE = 1e-5
STEPS = 5
BASE = [
    "train.global_batch=4",
    "model.layers=2",
    "data.sequence_length=16",
    f"train.steps={STEPS}",
    # Larger gradients than at the usual start, so that less of each is rounding.
    "model.init_std=0.1",
    "optimizer.eps=1e-3",
    "optimizer.m3.every=2",
    "optimizer.sgd.momentum=0.9",
]
SPOILED = 3
LAYOUTS = {
    "tp2-dp2": (4, 4, ["parallel.tensor=2"]),
    "pp2-two-nodes": (4, 2, ["parallel.pipeline=2"]),
    "tp2-two-nodes": (4, 2, ["parallel.tensor=2"]),
    "dp2-two-nodes-all": (4, 2, ["parallel.shard_optimizer=all"]),
    "dp2-two-nodes-matrices": (4, 2, ["parallel.shard_optimizer=matrices"]),
    "tp2-two-nodes-matrices": (4, 2, ["parallel.tensor=2", "parallel.shard_optimizer=matrices"]),
    "tp2-pp2-two-nodes-all": (8, 4, ["parallel.tensor=2", "parallel.pipeline=2",
                                     "parallel.shard_optimizer=all"]),
}  # fmt: skip


def levels_of(rules: tuple[str, str, str]) -> str:
    """Three levels, each with a rule; the last one's last window is not full."""
    entries = zip((1, 2, 3), rules, strict=True)
    return f"levels=[{', '.join(f'{{period: {p}, optimizer: {{rule: {r}}}}}' for p, r in entries)}]"


RULES = [("muon", "m3", "delta"), ("m3", "deep", "sgd"), ("deep", "adamw", "muon")]


# Where no matrix is whole on a rank, or each is on one node: with all rules. Elsewhere with some.
EVERYWHERE = ("dp2-two-nodes-all", "tp2-two-nodes-matrices")
CASES = [
    pytest.param(rules, layout, id=f"{'-'.join(rules)}-{layout}")
    for i, rules in enumerate(RULES)
    for j, layout in enumerate(LAYOUTS)
    if layout in EVERYWHERE or j % len(RULES) == i
]


OneProcess = Callable[[tuple[str, str, str]], tuple[list[str], dict]]


@pytest.fixture(scope="module")
def one_process() -> OneProcess:
    """`one_process(rules)`: the keys of a run whose third step is dropped, and what it came to."""

    @functools.cache
    def trained(rules: tuple[str, str, str]) -> tuple[list[str], dict]:
        overrides = [*BASE, levels_of(rules)]
        (found,) = world.run(1, run_engine, overrides, {SPOILED: 0})
        assert found["admitted"] == [step != SPOILED for step in range(1, STEPS + 1)]
        return overrides, found

    return trained


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_a_rule_is_its_equation(one_process: OneProcess, rules: tuple[str, str, str]) -> None:
    overrides, found = one_process(rules)
    (plain,) = world.run(1, run_plain, overrides, frozenset({SPOILED}))
    assert largest_difference(found["parameters"], plain["parameters"]) <= 1e-6


@pytest.mark.parametrize(("rules", "layout"), CASES)
def test_a_rule_on_a_layout_is_that_of_one_process(
    one_process: OneProcess, rules: tuple[str, str, str], layout: str
) -> None:
    overrides, expected = one_process(rules)
    ranks, per_node, keys = LAYOUTS[layout]
    results = world.run(
        ranks, run_engine, [*overrides, *keys], {SPOILED: 1}, ranks_per_node=per_node
    )
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5, nan_ok=True)
        assert result["counts"] == expected["counts"]
    assert largest_difference(results[0]["parameters"], expected["parameters"]) <= TOLERANCE
    if "parallel.shard_optimizer=all" in keys:
        # The plan takes owners to be anywhere; of few matrices some own what they hold already.
        planned = sum(results[0]["bytes_by_step"])
        assert 0.8 * planned <= results[0]["sent"] <= 1.05 * planned
    if layout == "dp2-two-nodes-matrices":  # no matrix crosses: all is as planned
        planned = sum(results[0]["bytes_by_step"])
        assert results[0]["sent"] == pytest.approx(planned, rel=PADDING)
    if "parallel.tensor=2" not in keys and "parallel.pipeline=2" not in keys:
        assert len({tuple(result["hashes"]) for result in results}) == 1, "replicas differ"

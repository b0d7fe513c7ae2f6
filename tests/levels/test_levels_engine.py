"""The level engine: deferring the reduction of slow levels changes nothing but the traffic."""

from __future__ import annotations

import random

import pytest
import world
from levels.level_runs import largest_difference, run_engine, run_oracle

# Rounding of sums in another order, through a dozen Adam steps. Seen: 1e-7 to 3e-7.
TOLERANCE = 1e-6


def random_run(seed: int) -> list[str]:
    """Periods, phases and clipping drawn anew; the seed is the test's parameter."""
    draw = random.Random(seed)
    count = draw.choice([2, 3])
    periods = sorted(draw.choice([1, 2, 3, 4, 5, 7]) for _ in range(count - 1))
    return [
        f"levels=[1,{','.join(map(str, periods))}]",
        f"levels.stagger={draw.choice(['true', 'false'])}",
        f"optimizer.clip={draw.choice([0, 0.05])}",
        f"optimizer.clip_scope={draw.choice(['level', 'joint'])}",
        f"optimizer.warmup_updates={draw.choice([0, 4])}",
        f"levels.learning_rate_rule={draw.choice(['none', 'sqrt', 'linear'])}",
        f"train.steps={draw.randint(9, 14)}",
        f"run.seed={seed}",
    ]


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)])
def test_deferred_levels_give_what_a_plain_single_process_gives(ranks: int, per_node: int) -> None:
    overrides = random_run(seed=100 * ranks + per_node)
    results = world.run(ranks, run_engine, overrides, ranks_per_node=per_node)
    (oracle,) = world.run(1, run_oracle, overrides)
    assert results[0]["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
    difference = largest_difference(results[0]["parameters"], oracle["parameters"])
    assert difference <= TOLERANCE, overrides


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_deferred_equals_every_step(seed: int) -> None:
    overrides = random_run(seed)
    deferred = world.run(4, run_engine, overrides, ranks_per_node=2)
    every_step = world.run(
        4, run_engine, [*overrides, "levels.reduction=every-step"], ranks_per_node=2
    )
    difference = largest_difference(deferred[0]["parameters"], every_step[0]["parameters"])
    assert difference <= TOLERANCE, overrides


def test_the_same_holds_where_adam_is_momentum_sgd() -> None:
    # With an eps far above the gradients Adam steps by lr / eps times the momentum: SGD.
    overrides = ["levels=[1,2,5]", "train.steps=11", "optimizer.eps=1e3", "optimizer.clip=0"]
    overrides.append("optimizer.learning_rate=5")
    results = world.run(4, run_engine, overrides, ranks_per_node=2)
    (oracle,) = world.run(1, run_oracle, overrides)
    assert oracle["losses"][-1] < oracle["losses"][0] - 0.001, "it must move to be a comparison"
    difference = largest_difference(results[0]["parameters"], oracle["parameters"])
    assert difference <= TOLERANCE


def test_replicas_are_bit_identical_after_every_step() -> None:
    results = world.run(4, run_engine, ["levels=[1,2,4]", "train.steps=9"], ranks_per_node=2)
    for step in range(9):
        assert len({r["hashes"][step] for r in results}) == 1, f"replicas differ at step {step + 1}"
    assert len(set(results[0]["hashes"])) == 9, "parameters must move at every step"


def test_a_spoiled_step_on_one_rank_leaves_every_rank_as_if_it_had_not_happened() -> None:
    overrides = ["levels=[1,4]", "train.steps=10"]
    # rank 3 fails in the middle of a window, rank 0 at the step at which one closes
    results = world.run(4, run_engine, overrides, {3: 3, 8: 0}, ranks_per_node=2)
    (oracle,) = world.run(1, run_oracle, overrides, frozenset({3, 8}))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == [3, 8]
    for result in results:
        difference = largest_difference(result["parameters"], oracle["parameters"])
        assert difference <= TOLERANCE
    assert len({r["hashes"][-1] for r in results}) == 1


@pytest.mark.parametrize("scope", ["level", "joint"])
@pytest.mark.parametrize("reduction", ["deferred", "every-step"])
def test_dropped_steps_count_nowhere(scope: str, reduction: str) -> None:
    overrides = [
        "levels=[1,2]",
        "levels.stagger=false",
        "train.steps=9",
        "optimizer.clip=0.05",
        f"optimizer.clip_scope={scope}",
        f"levels.reduction={reduction}",
    ]
    # the first update of all, a window of two steps that are both dropped, and the last step
    dropped = [1, 5, 6, 9]
    spoil = {step: step % 4 for step in dropped}
    results = world.run(4, run_engine, overrides, spoil, ranks_per_node=2)
    (oracle,) = world.run(1, run_oracle, overrides, frozenset(dropped))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == dropped
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE
    # level 1 closes after 2, 4, 8 with tokens, after 6 and 9 with none
    assert [updates for updates, _ in results[0]["counts"]] == [5, 3]


def test_a_slow_level_updates_and_reduces_once_a_period() -> None:
    (result,) = world.run(
        1, run_engine, ["levels=[1,3,5]", "levels.stagger=false", "train.steps=11"]
    )
    # the partial windows at the end are applied: 11 = 3 * 3 + 2 = 2 * 5 + 1
    assert result["counts"] == [(11, 11), (4, 4), (3, 3)]


def test_independent_cms_and_attention_also_defer_exactly() -> None:
    overrides = [
        "levels=[1,2,4]",
        "train.steps=9",
        "model.cms=independent",
        "model.mixer=attention",
    ]
    results = world.run(2, run_engine, overrides, ranks_per_node=1)
    (oracle,) = world.run(1, run_oracle, overrides)
    difference = largest_difference(results[0]["parameters"], oracle["parameters"])
    assert difference <= TOLERANCE

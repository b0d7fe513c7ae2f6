"""The level engine: deferring the reduction of slow levels changes nothing but the traffic."""

from __future__ import annotations

import random

import pytest
import world
from levels.level_runs import largest_difference, run_engine, run_oracle

# Rounding of sums in another order, through a dozen Adam steps. Seen: 1e-7 to 3e-7.
TOLERANCE = 1e-6
# megatron-core begins each of the many vectors of these small models at a multiple of 64.
PADDING = 0.05


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
        f"parallel.overlap={draw.choice(['true', 'true', 'false'])}",
        f"parallel.bucket_size={draw.choice([300, 3000, 40_000_000])}",
        f"train.steps={draw.randint(7, 8)}",
        f"run.seed={seed}",
        f"levels.phases={draw.choice(['by_depth', 'interleaved'])}",
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
    overrides = ["levels=[1,2,4]", "train.steps=8", "optimizer.eps=1e3", "optimizer.clip=0"]
    overrides.append("optimizer.learning_rate=5")
    results = world.run(4, run_engine, overrides, ranks_per_node=2)
    (oracle,) = world.run(1, run_oracle, overrides)
    assert oracle["losses"][-1] < oracle["losses"][0] - 0.001, "it must move to be a comparison"
    difference = largest_difference(results[0]["parameters"], oracle["parameters"])
    assert difference <= TOLERANCE


def test_replicas_are_bit_identical_after_every_step() -> None:
    results = world.run(4, run_engine, ["levels=[1,2,3]", "train.steps=6"], ranks_per_node=2)
    for step in range(6):
        assert len({r["hashes"][step] for r in results}) == 1, f"replicas differ at step {step + 1}"
    assert len(set(results[0]["hashes"])) == 6, "parameters must move at every step"


def test_a_spoiled_step_on_one_rank_leaves_every_rank_as_if_it_had_not_happened() -> None:
    overrides = ["levels=[1,3]", "train.steps=7"]
    # rank 3 fails in the middle of a window, rank 0 at the step at which one closes
    results = world.run(4, run_engine, overrides, {2: 3, 6: 0}, ranks_per_node=2)
    (oracle,) = world.run(1, run_oracle, overrides, frozenset({2, 6}))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == [2, 6]
    for result in results:
        difference = largest_difference(result["parameters"], oracle["parameters"])
        assert difference <= TOLERANCE
    assert len({r["hashes"][-1] for r in results}) == 1


@pytest.mark.parametrize(
    ("scope", "reduction"), [("level", "deferred"), ("joint", "every-step"), ("joint", "deferred")]
)
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


LAYOUTS = {
    "sequence parallel, two nodes": (4, 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "mixture, two nodes": (4, 2, ["parallel.tensor=2", "model.cms=independent"]),
    "pipeline over two nodes": (4, 1, ["parallel.pipeline=2"]),
    "interleaved over two nodes": (4, 1, ["parallel.pipeline=2", "parallel.virtual_stages=2"]),
    "all at once": (
        8,
        2,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_dropped_exactly_in_every_layout(layout: str) -> None:
    """At a step at which a window closes, in the middle of one, and at the last."""
    ranks, per_node, overrides = LAYOUTS[layout]
    overrides = [
        *overrides,
        "model.layers=4" if "interleaved" in layout else "model.layers=2",
        "data.sequence_length=16",
        "levels=[1,2,5]",
        "train.steps=7",
        "train.global_batch=4",
        "optimizer.eps=1e-3",
        "parallel.bucket_size=300",
    ]
    dropped = [4, 6, 7]
    spoil = {step: ranks - 1 for step in dropped}  # the last stage holds what is spoiled
    results = world.run(ranks, run_engine, overrides, spoil, ranks_per_node=per_node)
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (oracle,) = world.run(1, run_oracle, alone, frozenset(dropped))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == dropped
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE


def test_a_window_that_loses_its_last_step_crosses_again() -> None:
    overrides = ["levels=[1,4]", "levels.stagger=false", "train.steps=8"]
    (kept, *_), (lost, *_) = (
        world.run(2, run_engine, overrides, spoil, ranks_per_node=1) for spoil in ({}, {4: 1})
    )
    assert (kept["counts"], lost["counts"]) == ([(8, 8), (2, 2)], [(7, 8), (2, 3)])
    slow = kept["bytes_by_step"][3] - kept["bytes_by_step"][2]
    assert lost["bytes_by_step"][3] - kept["bytes_by_step"][3] == pytest.approx(slow)
    assert lost["sent"] - kept["sent"] == pytest.approx(slow, rel=PADDING)


@pytest.mark.parametrize("layout", [(2, 1, []), (4, 1, ["parallel.pipeline=2"])])
def test_reductions_across_nodes_start_during_the_backward_pass(layout: tuple) -> None:
    ranks, per_node, overrides = layout
    overrides = [*overrides, "data.sequence_length=16", "levels=[1,2]", "train.steps=4"]
    overrides += ["parallel.bucket_size=3000", "levels.stagger=false"]
    for result in world.run(ranks, run_engine, overrides, ranks_per_node=per_node):
        early, all_of_them = zip(*result["started"], strict=True)
        # The first step finds out how many gradients to wait for; the second closes both windows.
        assert early[0] == 0
        assert early[1] == all_of_them[1] > all_of_them[2] == early[2] > 1
    late = world.run(
        ranks, run_engine, [*overrides, "parallel.overlap=false"], ranks_per_node=per_node
    )
    assert not any(early for result in late for early, _ in result["started"])


@pytest.mark.parametrize("reduction", ["deferred", "every-step"])
def test_half_the_bytes_are_within_rounding_and_the_same_on_all_nodes(reduction: str) -> None:
    overrides = ["levels=[1,3]", "levels.stagger=false", "train.steps=6"]
    overrides.append(f"levels.reduction={reduction}")
    exact, half = (
        world.run(3, run_engine, [*overrides, f"levels.spectrum.1.wire={wire}"], ranks_per_node=1)
        for wire in ("fp32", "bf16")
    )
    for step in range(6):
        assert len({r["hashes"][step] for r in half}) == 1, f"nodes differ at step {step + 1}"
    difference = largest_difference(half[0]["parameters"], exact[0]["parameters"])
    # Two roundings to 8 bits of each gradient: 2^-8 of it; Adam makes of it as much of an update.
    assert 0 < difference <= 2**-7 * 6 * 1e-3 / 0.02
    fewer = sum(exact[0]["bytes_by_step"]) - sum(half[0]["bytes_by_step"])
    assert exact[0]["sent"] - half[0]["sent"] == pytest.approx(fewer, rel=PADDING) and fewer > 0


def test_a_slow_level_updates_and_reduces_once_a_period() -> None:
    (result,) = world.run(
        1, run_engine, ["levels=[1,3,5]", "levels.stagger=false", "train.steps=11"]
    )
    # the partial windows at the end are applied: 11 = 3 * 3 + 2 = 2 * 5 + 1
    assert result["counts"] == [(11, 11), (4, 4), (3, 3)]


def test_independent_cms_and_attention_also_defer_exactly() -> None:
    overrides = [
        "levels=[1,2,3]",
        "train.steps=6",
        "model.cms=independent",
        "model.mixer=attention",
    ]
    results = world.run(2, run_engine, overrides, ranks_per_node=1)
    (oracle,) = world.run(1, run_oracle, overrides)
    difference = largest_difference(results[0]["parameters"], oracle["parameters"])
    assert difference <= TOLERANCE

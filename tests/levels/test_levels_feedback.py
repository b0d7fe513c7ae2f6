"""What crosses as integers: nothing is lost, nodes stay alike, and bytes are as few as is said."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from levels.feedback_runs import run_with_account
from levels.level_runs import TINY, VOCABULARY, load, run_engine
from levels.test_levels_engine import PADDING
from torch import Tensor

from nlscale.config import recipe
from nlscale.config.vocabulary import WireFormat
from nlscale.levels import feedback
from nlscale.levels.notes import approximate
from nlscale.levels.spectrum import BLOCK, spectrum
from nlscale.levels.wire import Wire
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan.memory import memory
from nlscale.plan.traffic import traffic

RUN = [
    "model.layers=1", "levels.stagger=false", "train.steps=6", "train.global_batch=3",
    "levels=[{period: 1, wire: int4}, {period: 3, wire: int8}]", "data.sequence_length=16",
]  # fmt: skip
EXACT = 2e-6
"""Relative, of sums of a few steps in fp32."""


def test_what_is_sent_and_what_is_owed_are_all_gradients_at_any_moment() -> None:
    """Of runs with dropped steps: where a window closes, inside one, and the last; and with a step
    of which no target counts, which closes a window of its own."""
    ways = [
        [],
        ["levels.reduction=every-step"],
        ["parallel.shard_optimizer=all"],
        ["parallel.shard_optimizer=matrices", "optimizer.rule=muon"],
        ["levels.period_warmup.steps=4 steps"],
    ]
    spoil, masked = {3: 1, 5: 0, 6: 2}, (2,)
    runs = [[*RUN, *way] for way in ways]
    of_ranks = world.run(3, run_with_account, runs, spoil, masked, ranks_per_node=1)
    for way, *results in zip(ways, *of_ranks, strict=True):
        for found in results:
            assert [i + 1 for i, ok in enumerate(found["admitted"]) if not ok] == [3, 5, 6]
            assert max(found["gaps"]) <= EXACT, way
            assert found["different"] == [None] * 6, way
            assert found["owed"] > 0


def test_a_window_without_targets_that_count_lets_go_of_nothing() -> None:
    """All that it would have sent is of steps before, and it makes no update."""
    runs = [[*RUN, f"levels.reduction={way}"] for way in ("deferred", "every-step")]
    for result in world.run(2, run_with_account, runs, {}, (4, 5, 6), ranks_per_node=1):
        for found in result:
            assert max(found["gaps"]) <= EXACT


def test_a_short_last_window_gets_no_more_of_what_is_owed_than_its_share() -> None:
    """Of 8 steps what rounding leaves is 8 times that of one. Here all steps have the same
    gradient, so that the last update, by one step, is off by what the first has left and by its own
    rounding, of means that are alike."""
    run = [*RUN, "levels=[{period: 8, wire: int4}]", "train.steps=9", "train.global_batch=2"]
    run += ["optimizer.rule=sgd", "optimizer.learning_rate=1e-20"]
    runs = [run, [*run, "levels.reduction=every-step"]]
    both = world.run(2, run_with_account, runs, {}, (), 0.0, True, ranks_per_node=1)[0]
    of_a_mean = both[0]["missed"][0]
    for found in both:
        assert 0 < found["missed"][1] <= 2 * of_a_mean < 0.5
        assert max(found["gaps"]) <= EXACT


def test_tensor_ranks_stay_alike_in_what_all_of_them_hold() -> None:
    run = [*RUN, "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=16"]
    run += ["train.global_batch=2", "train.steps=4"]
    runs = [run, [*run, "parallel.shard_optimizer=matrices", "optimizer.rule=muon"]]
    for result in world.run(4, run_with_account, runs, {}, ranks_per_node=2):
        for found in result:
            assert found["different"] == [None] * 4
            assert max(found["gaps"]) <= EXACT and found["owed"] > 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_is_owed_goes_as_it_is_where_nothing_is_rounded(nodes: int) -> None:
    """On one node, and where the level has become one that crosses exactly."""
    run = [*RUN, "levels=[1,3]", "train.global_batch=2"]
    runs = [run, [*run, "levels.reduction=every-step"]]
    for result in world.run(
        nodes, run_with_account, runs, {1: 0, 3: 0}, (), 1e-2, ranks_per_node=1
    ):
        for found in result:
            assert max(found["gaps"]) <= EXACT
            assert found["different"] == [None] * 6 and found["owed"] == 0


def test_in_int8_it_trains_as_exactly_as_its_errors_allow() -> None:
    """An integer is off by no more than half a scale, max |v| / 254, and so a block v of 128 values
    by sqrt(128) / 254 |v| = 0.045 |v|: e of every node, and E of the total, by 0.047 of the norms
    S of the nodes' sums together, what they owe already included. Under SGD what all updates have
    lacked at any moment is what is owed, twice that where the rate rises and falls: weights are
    within 2 r 0.1 S of the exact ones, with r the largest rate over the targets, and the loss,
    whose gradient is no longer than S, within r 0.2 S^2; twice that for how it comes back.
    """
    rate, run = 0.05, [*RUN, "train.steps=8", "data.sequence_length=16", "train.global_batch=2"]
    run += ["optimizer.rule=sgd", "optimizer.sgd.momentum=0", "optimizer.clip=0"]
    run += ["optimizer.weight_decay=0", f"optimizer.learning_rate={rate}"]
    runs = [[*run, f"levels=[{{period: 1, wire: {wire}}}]"] for wire in ("fp32", "int8")]
    (exact, rounded), _ = world.run(2, run_with_account, runs, {}, (), 0.0, True, ranks_per_node=1)
    gaps = [abs(a - b) for a, b in zip(exact["losses"], rounded["losses"], strict=True)]
    bound = 2 * rate * 0.2 * max(exact["sums"]) ** 2
    assert 0 < max(gaps) <= bound
    learned = exact["losses"][0] - exact["losses"][-1]
    assert bound < 0.3 * learned, f"it says something: {bound} of {learned}"


def test_crossing_during_the_backward_pass_changes_nothing() -> None:
    keys = [*RUN, "train.global_batch=2"]
    over, after = (
        world.run(2, run_engine, [*keys, f"parallel.overlap={overlap}"],
                  {3: 1}, ranks_per_node=1)
        for overlap in ("true", "false")
    )  # fmt: skip
    assert over[0]["hashes"] == over[1]["hashes"] == after[0]["hashes"]
    assert over[0]["started"][2][0] > 0


# One shard on three nodes

STEPS = (True, True, False, True)
"""Whether what has crossed is of use."""
CUT = [[slice(0, 5), slice(300, 700)], [slice(5, 300)], []]
CASES: dict[str, dict[str, Any]] = {
    "int8": {"numel": 1201, "wire": "int8"},
    "int4, zeros": {"numel": 1300, "wire": "int4", "zeros": 500},
    "in pieces": {"numel": 1301, "wire": "int4", "piece": 3 * BLOCK},
    "one element": {"numel": 1, "wire": "int8"},
    "fewer than a block": {"numel": 7, "wire": "int4"},
    "spoiled": {"numel": 900, "wire": "int8", "spoils": 1},
    "kept by owners": {"numel": 1201, "wire": "int8", "gathered": 4},
    "spoiled, kept by owners": {"numel": 900, "wire": "int4", "gathered": 4, "spoils": 2},
    "cut": {"numel": 700, "wire": "int4", "gathered": 4, "cut": CUT, "piece": 3 * BLOCK},
}


def cross_all(seed: int) -> list[dict[str, Any]]:
    """On a rank of a world: every case."""
    feedback.dist = counting = Counting()  # type: ignore[assignment]
    with process_groups(load(["train.global_batch=3"])) as layout:
        return [_cross(case, layout, counting, seed) for case in CASES.values()]


class Counting:
    """torch.distributed, counting what a rank sends to others."""

    sent = 0

    def all_to_all_single(self, out: Any, given: Any, to: Any, of: Any, group: Any) -> None:
        self.sent += sum(of) - of[group.rank()]
        dist.all_to_all_single(out, given, to, of, group=group)

    def all_gather_into_tensor(self, out: Any, given: Any, group: Any) -> None:
        self.sent += given.numel() * (group.size() - 1)
        dist.all_gather_into_tensor(out, given, group=group)


def _cross(case: dict[str, Any], layout: Layout, counting: Counting, seed: int) -> dict[str, Any]:
    feedback._PIECE = case.get("piece", 2**24)
    torch.manual_seed(seed + layout.rank)
    wire, counting.sent = Wire(layout, gathered=case.get("gathered")), 0
    numel, format_, cut = case["numel"], WireFormat(case["wire"]), case.get("cut")
    owed = wire.owed([torch.zeros(numel)], format_)
    packed = wire.packed(owed, 0, format_, cut)
    found: dict[str, Any] = {"given": [], "sums": [], "errors": [], "totals": []}
    for accepted in STEPS:
        shard = torch.randn(numel)
        shard[: case.get("zeros", 0)] = 0.0
        if not accepted and case.get("spoils") == layout.rank:
            shard[numel // 2] = float("nan")
        found["given"].append(shard.clone())
        wire.start(shard, format_, None, cut, packed)
        wire.finish()
        owed.settle(torch.tensor(accepted))
        found["sums"].append(shard)
        found["errors"].append(owed.errors[0].clone())
        found["totals"] += [each.clone() for each in owed.totals]
    owned = wire.owned(cut, numel) if "gathered" in case else [slice(*owed.owned[0])]
    return {**found, "owned": owned, "bytes": wire.bytes, "sent": counting.sent}


def rounded(values: Tensor, bits: int) -> Tensor:
    """Q of MATH, block by block."""
    found = [torch.empty(0)]
    for block in values.split(BLOCK) if len(values) else ():
        exact = block.abs().max() / (2 ** (bits - 1) - 1)
        scale = ((exact.view(torch.int32) + 255) // 256 * 256).view(torch.float32)
        scale = scale if exact.isfinite() else exact
        found.append((block / scale).round() * scale if scale != 0 else torch.zeros_like(block))
    return torch.cat(found)


def test_a_shard_crosses_in_two_hops_and_what_is_left_is_kept() -> None:
    """To the bit, against the two hops written down in one process."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    of_nodes = world.run(3, cross_all, seed, ranks_per_node=1)
    for (name, case), *nodes in zip(CASES.items(), *of_nodes, strict=True):
        bits, comes_back, numel = int(case["wire"][3:]), "gathered" not in case, case["numel"]
        errors, total_error = [torch.zeros(numel) for _ in nodes], torch.zeros(numel)
        gradients, arrived = torch.zeros(numel).double(), torch.zeros(numel).double()
        for step, accepted in enumerate(STEPS):
            given = [node["given"][step] for node in nodes]
            made, made_of_total = [torch.zeros(numel) for _ in nodes], torch.zeros(numel)
            want = torch.zeros(numel)
            for own in (each for node in nodes for each in node["owned"]):
                for x, error, left in zip(given, errors, made, strict=True):
                    sent = rounded((x + error)[own], bits)
                    left[own] = (x + error)[own] - sent
                    want[own] += sent
                if comes_back:
                    total = want[own] + total_error[own]
                    want[own] = rounded(total, bits)
                    made_of_total[own] = total - want[own]
            for node in nodes:
                for own in [slice(None)] if comes_back else node["owned"]:
                    got, wanted = node["sums"][step][own], want[own]
                    assert torch.equal(got.isnan(), wanted.isnan()), f"{name}: seen by all"
                    assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), name
            if accepted:
                errors, total_error = made, made_of_total
                gradients += sum(x.double() for x in given)
                arrived += want.double()
            for node, error in zip(nodes, errors, strict=True):
                assert torch.equal(node["errors"][step], error), name
                if comes_back:
                    assert torch.equal(node["totals"][step], total_error[node["owned"][0]]), name
        assert all(error.isfinite().all() for error in errors)
        gap = gradients - arrived - sum(errors).double() - total_error.double()
        assert gap.abs().max() <= 1e-6 * gradients.abs().max(), name
        assert [node["bytes"] for node in nodes] == [node["sent"] for node in nodes], name


def test_the_plan_counts_bytes_memory_and_checkpoints() -> None:
    run = [*RUN, "train.global_batch=2"]
    for way in ("node", "all"):
        keys = [*run, f"parallel.shard_optimizer={way}"]
        (found,), _ = world.run(2, run_with_account, [keys], {}, ranks_per_node=1)
        assert found["bytes"] == pytest.approx(found["planned"], rel=PADDING)
        config = recipe.load(None, [*TINY, *keys]).config
        levels = spectrum(config.levels, 100)
        with_errors, without = (
            memory(config, own, VOCABULARY, 1, 1, group_nodes=2)[0].windows
            for own in (levels, spectrum(load([*keys, "levels=[1,3]"]).levels, 100))
        )
        # and what crossing takes in passing, 8 bytes an element of the larger level
        passing = 8 * max(traffic_parameters(config))
        assert with_errors - without - passing == pytest.approx(found["owed_bytes"], rel=PADDING)
        back = 2 if way == "node" else 1
        assert found["owed_bytes"] == pytest.approx(
            8 * found["elements"] * (1 + (back == 2) / 2), rel=PADDING
        )
    fewer = {wire: planned_mean(wire) for wire in ("fp32", "bf16", "int8", "int4")}
    share = {wire: mean / fewer["fp32"] for wire, mean in fewer.items()}
    assert share == pytest.approx(
        {"fp32": 1, "bf16": 1 / 2, "int8": 33 / 128, "int4": 17 / 128}
    )  # of 4 bytes: a value's own, and 1/128 of a scale's


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_on_one_node_a_wire_takes_no_memory(wire: str) -> None:
    exact, rounded = (
        memory(config, spectrum(config.levels, 100), VOCABULARY, 1, 1)[0].windows
        for config in (load(["levels=[1,3]"]), load([f"levels=[1, {{period: 3, wire: {wire}}}]"]))
    )
    assert rounded == exact


def traffic_parameters(config: Any) -> list[float]:
    from nlscale.levels.groups import parameters_by_depth

    return [float(sum(depths)) for depths in parameters_by_depth(config, VOCABULARY)]


def planned_mean(wire: str) -> float:
    keys = [f"levels=[{{period: 1, wire: {wire}}}, {{period: 4, wire: {wire}}}]"]
    config = load(keys)
    return traffic(config, spectrum(config.levels, 100), VOCABULARY, 3).mean


@pytest.mark.root
def test_the_link_carries_what_is_counted_and_planned() -> None:
    """Between emulated nodes, by the counters of their interfaces."""
    program = [sys.executable, str(Path(__file__).with_name("on_links.py"))]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    for node in json.loads(ran.stdout.splitlines()[-1]):
        assert [name for name, *_ in node] == ["int8", "int4"]
        for _, sent, counted, planned in node:
            assert counted == pytest.approx(planned, rel=1e-4)
            assert 1.0 < sent / planned < 1.05


def test_levels_that_cross_as_integers_say_so() -> None:
    levels = spectrum(load(["levels=[1, {period: 4, wire: int4}]"]).levels, 100)
    (line,) = approximate(levels, crosses=True)
    assert line == (
        "level 'level1' crosses between nodes in int4 with error feedback: its updates are "
        "approximate, and depend on the number of nodes"
    )
    assert not approximate(levels, crosses=False)

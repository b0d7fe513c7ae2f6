"""Bandwidths by a clock of the test's own, and what overlapping hides; nothing here is timed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
import world
from levels.level_runs import VOCABULARY, load

from nlscale.bench import links
from nlscale.bench.links import all_reduce_bandwidth, overlap_reached
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.spectrum import spectrum
from nlscale.plan.traffic import traffic

RUN = [
    *(f"model.vocabulary={VOCABULARY}", "model.layers=2", "model.d_model=16", "model.heads=2"),
    *("data.sequence_length=8", "train.micro_batch=2", "train.global_batch=8", "levels=[1,2]"),
]
WAY = {"waited_seconds", "waited_seconds_reducing", "step_seconds"}


def by_own_clock(overrides: list[str]) -> tuple[dict[str, Any], list[int]]:
    """Rank r finds that a byte takes r + 1 ns; and how many bytes it reduced each time."""
    reduced: list[int] = []

    def median(device: torch.device, repeats: int, run: Any) -> float:
        dist, all_reduce = links.dist, links.dist.all_reduce
        dist.all_reduce = lambda x, group: reduced.append(x.nbytes) or all_reduce(x, group=group)
        run(None)
        dist.all_reduce = all_reduce
        return 1e-9 * (dist.get_rank() + 1) * reduced[-1]

    links.median_seconds = median
    return all_reduce_bandwidth(load(overrides), [0.001, 0.5], 3), reduced


def overlap(overrides: list[str], steps: int) -> dict[str, Any]:
    return overlap_reached(load(overrides), steps)


def with_waits(overrides: list[str], steps: int) -> dict[str, Any]:
    """Of a trainer that only says how long it waited, and sends in each second step; and that
    computes something else when it overlaps."""

    class Says:
        def __init__(self, config: Config, layout: Any, *rest: Any) -> None:
            self.late, self.group = 100.0 * (1 - layout.node_rank), layout.rank % 2
            self.factor = 0.25 if config.parallel.overlap else 1.0
            self.counters = SimpleNamespace(bytes_sent=0.0)
            self.step = -links._WARM_UP

        def take_step(self, batches: list[Any]) -> tuple[Any, None]:
            self.step += 1
            sends = self.step % 2 == 0
            waited = [[2.0, 8.0], [0.5, 4.0]][self.group][sends]
            if self.step in (1, 2):
                waited *= 50  # once, of three cycles
            self.waits = SimpleNamespace(link=self.late + self.factor * waited)
            self.counters.bytes_sent += 10.0 * sends
            return SimpleNamespace(admitted=True, loss=1 + self.factor), None

    links.Trainer = SimpleNamespace(build=Says)
    return overlap(overrides, steps)


@dataclass(frozen=True)
class Seen:
    """What one of four ranks, two on each of two nodes, has been told."""

    bandwidth: tuple[dict[str, Any], list[int]]
    reached: dict[str, Any]
    waits: dict[str, Any]


def all_of_it() -> Seen:
    return Seen(by_own_clock(RUN), overlap(RUN, 4), with_waits(RUN, 6))


@pytest.fixture(scope="module")
def two_nodes() -> list[Seen]:
    return world.run(4, all_of_it, ranks_per_node=2)


def test_bandwidths_are_those_of_a_ring_and_of_the_slowest_rank(two_nodes: list[Seen]) -> None:
    result, reduced = two_nodes[0].bandwidth
    assert all(seen.bandwidth == (result, reduced) for seen in two_nodes)
    assert reduced == 3 * [1000, 500_000]
    assert (result["backend"], result["ranks"], result["nodes"]) == ("gloo", 4, 2)
    groups = dict(result["groups"])
    assert groups.pop("tensor_parallel") is None
    shapes = {name: (group["ranks"], group["groups_at_once"]) for name, group in groups.items()}
    assert shapes == {"within_node": (2, 2), "between_nodes": (2, 2), "world": (4, 1)}
    for group in groups.values():
        ring = 2 * (group["ranks"] - 1) / group["ranks"]
        assert group["dtype"] == "float32"
        assert [size["bytes"] for size in group["sizes"]] == [1000, 500_000]
        for size in group["sizes"]:
            assert size["seconds"] == pytest.approx(4e-9 * size["bytes"])
            assert size["bus_bytes_per_second"] == pytest.approx(ring / 4e-9)


def test_less_than_a_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"1e-06 MB .* give 1 or more"):
        all_reduce_bandwidth(load(RUN), [1e-6], 1)


def test_both_ways_take_the_same_steps_and_send_what_the_plan_says(two_nodes: list[Seen]) -> None:
    config, result = load(RUN), two_nodes[0].reached
    assert all(seen.reached == result for seen in two_nodes)
    assert (result["nodes"], result["cycle"], result["steps"]) == (2, 2, 4)
    assert result["largest_loss_difference"] == 0 and result["because"] is None
    planned = traffic(config, spectrum(config.levels, 1), VOCABULARY, 2)
    assert result["bytes_per_step"] == pytest.approx(planned.mean)
    for way in ("without_overlap", "with_overlap"):
        assert result[way].keys() == WAY and min(result[way].values()) > 0
    hidden = result["with_overlap"]["waited_seconds"] / result["without_overlap"]["waited_seconds"]
    assert result["share_hidden"] == pytest.approx(1 - hidden)


def test_a_wait_is_that_of_the_last_to_come_and_of_the_usual_cycle(two_nodes: list[Seen]) -> None:
    result = two_nodes[0].waits
    # of the node that is there last, in the group of ranks that waits longer: 2 s and 8 s
    assert result["without_overlap"]["waited_seconds"] == pytest.approx((2 + 8) / 2)
    assert result["without_overlap"]["waited_seconds_reducing"] == pytest.approx(8)
    assert result["with_overlap"]["waited_seconds"] == pytest.approx(0.25 * (2 + 8) / 2)
    assert result["share_hidden"] == pytest.approx(0.75)
    assert result["bytes_per_step"] == 5
    assert result["largest_loss_difference"] == pytest.approx(0.75 / 2)


def on_one_node() -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    tensor_parallel = [*RUN, "parallel.tensor=2", "train.dtype=bf16"]
    return *by_own_clock(tensor_parallel), overlap(RUN, 2)


def test_one_node_has_no_links_to_others_and_tensor_parallel_ranks_reduce_activations() -> None:
    ((result, reduced, reached), _) = world.run(2, on_one_node)
    groups = result["groups"]
    assert groups["within_node"] is groups["between_nodes"] is None
    assert groups["tensor_parallel"]["dtype"] == "bfloat16" and groups["world"]["ranks"] == 2
    assert reduced == 2 * [1000, 500_000]
    assert "all on one node" in reached["because"]
    assert reached["share_hidden"] is reached["with_overlap"] is reached["bytes_per_step"] is None


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["model.vocabulary=null"], 2, "model.vocabulary"),
        ([], 3, "2 steps each; give 4"),
        ([], 0, "2 steps each; give 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides: list[str], steps: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        overlap([*RUN, *overrides], steps)


def on_a_gpu(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    config = load(overrides)
    with gpu.stand_in(rank=3, world=4, numbers=True):
        return all_reduce_bandwidth(config, [1], 2), overlap_reached(config, 2)


def test_both_find_what_they_ask_a_gpu_for() -> None:
    more = [*RUN, "train.kernels=false", "train.dtype=bf16", "parallel.ranks_per_node=2"]
    ((bandwidth, reached),) = world.run(1, on_a_gpu, more)
    assert bandwidth["device"] == "stand-in"
    assert bandwidth["groups"]["between_nodes"]["ranks"] == 2
    assert reached["nodes"] == 2 and reached["with_overlap"].keys() == WAY

"""Levels whose periods grow and fall: still the windows of a plain process, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, train
from levels.level_runs import VOCABULARY, largest_difference, load, run_engine, run_oracle
from levels.test_levels_engine import PADDING, TOLERANCE

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.inspection import inspection
from nlscale.config.vocabulary import Reduction
from nlscale.levels.spectrum import Level, SyncGroup, levels_of, sync_group
from nlscale.plan.traffic import traffic

# Periods of at most 1, 2, 4, 5 from steps 1, 3, 5, 7 on, and of 4, 2, 1 from steps 11, 13, 14 on.
WARM = [
    "data.sequence_length=16",
    "train.global_batch=4",
    "levels=[1,2,5]",
    "train.steps=14",
    "levels.period_warmup={steps: 6 steps, cooldown: 10 steps}",
    "levels.learning_rate_rule=sqrt",
    "optimizer.clip=0.05",
    "optimizer.eps=1e-3",
    "parallel.bucket_size=300",
]
DROPPED = frozenset({2, 6, 14})
"""A window of one step, one after a change, and the last."""
LAYOUTS = {
    "one rank": (1, 1, []),
    "two nodes": (4, 2, []),
    "tensor, two nodes": (4, 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline over two nodes": (4, 1, ["parallel.pipeline=2"]),
    "matrices over two nodes": (4, 2, ["parallel.shard_optimizer=all"]),
    "every step": (2, 1, ["levels.reduction=every-step"]),
}


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    (found,) = world.run(1, run_oracle, WARM, DROPPED)
    return found


def groups_of(overrides: list[str]) -> list[tuple[Level, set[SyncGroup]]]:
    config = load(overrides)
    layers, stagger = config.model.layers, config.levels.stagger
    return [
        (level, {sync_group(level, depth, layers, stagger) for depth in range(layers)})
        for level in levels_of(config)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_that_grow_and_fall_are_those_of_a_plain_process(
    oracle: dict[str, Any], layout: str
) -> None:
    ranks, per_node, more = LAYOUTS[layout]
    spoil = {step: ranks - 1 for step in DROPPED}
    results = world.run(ranks, run_engine, [*WARM, *more], spoil, ranks_per_node=per_node)
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE
    assert {i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok} == DROPPED
    if "every step" not in layout:
        empty = 1 + 1  # at step 2 every window has one step, that is dropped; at the last one some
        for (updates, _), (_, groups) in zip(results[0]["counts"], groups_of(WARM), strict=True):
            planned = max(group.updates(14) for group in groups)
            assert planned - empty - 1 <= updates < planned


def test_the_plan_is_what_crosses() -> None:
    keys = [*WARM, "model.d_model=64"]  # vectors are less of it, which are padded
    results = world.run(4, run_engine, keys, ranks_per_node=2)
    config = load(keys)
    planned = traffic(config, levels_of(config), VOCABULARY, 2).per_step
    # the last step applies unfinished windows, which the plan leaves out
    assert results[0]["bytes_by_step"][:-1] == pytest.approx(planned[:-1].tolist())
    assert results[0]["sent"] == pytest.approx(sum(results[0]["bytes_by_step"]), rel=PADDING)
    plain = traffic(config, levels_of(config), VOCABULARY, 2, reduction=Reduction.every_step)
    assert planned[:2] == pytest.approx(plain.per_step[:2]), "at period 1 everything crosses"
    assert planned.mean() < 0.9 * plain.mean
    found = traffic(config, levels_of(config), VOCABULARY, 2)
    assert found.mean == pytest.approx(planned.mean())
    assert [updates for updates, _ in results[0]["counts"]] == [
        max(group.updates(14) for group in groups) for _, groups in groups_of(WARM)
    ]


@pytest.mark.parametrize("step", [3, 11])
def test_a_run_goes_on_across_a_change_bit_by_bit(tmp_path: Path, step: int) -> None:
    """From a step at which some groups have a window open at whose end the period changes."""
    slow = groups_of(WARM)[2][1]
    assert any(not group.due(step) and group.period_at(step) != group.period_at(step + 5)
               for group in slow)  # fmt: skip
    keys = [*WARM, "optimizer.betas_by_period=true"]
    folders = tmp_path / "whole", tmp_path / "rest"
    (whole, *_) = world.run(2, train, keys, folders[0], (step,), ranks_per_node=1)
    folders[1].mkdir()
    (folders[0] / checkpoint(folders[0], step).path.name).rename(
        folders[1] / checkpoint(folders[0], step).path.name
    )
    fills = [level["window_fill"] for level in inspection(checkpoint(folders[1], step))["levels"]]
    assert all(0 <= fill <= 1 for fill in fills)
    (resumed, *_) = world.run(2, train, keys, folders[1], (), True, ranks_per_node=1)
    last = [checkpoint(folder, 14) for folder in reversed(folders)]
    assert compare(*last)["bitwise"]
    assert last[0].state["gradient_noise"] == last[1].state["gradient_noise"]
    for name, p in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], p), name


class PlainAdam:
    """AdamW with other betas, decay and rate at every update; torch's has one of each."""

    def __init__(self, p: torch.nn.Parameter, decay: float, ends: list[tuple[int, int]], config):
        self.p, self.decay, self.ends, self.config = p, decay, iter(ends), config
        self.m, self.v = torch.zeros_like(p), torch.zeros_like(p)
        self.left = [1.0, 1.0]
        self.param_groups: list[dict] = [{}]
        self.state: dict = {}

    @torch.no_grad()
    def step(self) -> None:
        o, (_, period) = self.config.optimizer, next(self.ends)
        b1, b2, g, rate = o.beta1**period, o.beta2**period, self.p.grad, self.param_groups[0]["lr"]
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        self.left = [self.left[0] * b1, self.left[1] * b2]
        self.p *= (1 - rate * self.decay) ** period
        root = (self.v / (1 - self.left[1])).sqrt() + o.eps
        self.p -= rate * self.m / (1 - self.left[0]) / root


def run_plain_betas(overrides: list[str]) -> dict[str, Any]:
    config = load(overrides)
    levels, steps = levels_of(config), config.train.steps

    def make(name: str, p: torch.nn.Parameter, level: int, depth: int) -> PlainAdam:
        group = sync_group(levels[level], depth, config.model.layers, config.levels.stagger)
        ends = [t for t in range(1, steps + 1) if group.due(t) or t == steps]
        decay = config.optimizer.weight_decay if p.dim() > 1 and "norm" not in name else 0.0
        return PlainAdam(p, decay, [(t, group.period_at(t)) for t in ends], config)

    return run_oracle(overrides, make=make)


def test_bias_correction_is_by_the_product_of_the_betas() -> None:
    keys = [*WARM, "optimizer.betas_by_period=true", "optimizer.weight_decay=0.5"]
    (plain,) = world.run(1, run_plain_betas, keys)
    (found,) = world.run(1, run_engine, keys)
    assert largest_difference(found["parameters"], plain["parameters"]) <= TOLERANCE
    (other,) = world.run(1, run_engine, WARM)
    assert largest_difference(found["parameters"], other["parameters"]) > 1e-4


def test_every_rule_takes_the_betas_of_the_window_that_closes() -> None:
    """Of one period alone as of a warm-up that never leaves it."""
    rules = "[{period: 1, optimizer: {rule: m3}}, {period: 4, optimizer: {rule: RULE}}]"
    for rule in ("muon", "sgd"):
        keys = ["model.layers=2", "data.sequence_length=16", "train.global_batch=2",
                "train.steps=8", "optimizer.betas_by_period=true", "optimizer.sgd.momentum=0.9",
                "optimizer.m3.every=2", "levels.stagger=false"]  # fmt: skip
        grown = [*keys, f"levels={rules.replace('RULE', rule)}"]
        capped = "levels.period_warmup.critical_batch=[{from: 0, tokens: 300 tokens}]"
        (short,) = world.run(1, run_engine, [*grown, capped])
        two = [*keys, f"levels={rules.replace('RULE', rule).replace('period: 4', 'period: 2')}"]
        (plain,) = world.run(1, run_engine, two)
        assert short["counts"] == plain["counts"] == [(8, 8), (4, 4)]
        for name, p in plain["parameters"].items():
            assert torch.allclose(short["parameters"][name], p, rtol=1e-5, atol=1e-7), (rule, name)

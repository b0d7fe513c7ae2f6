"""What rules over whole matrices send and compute: the plan against a run that counts it."""

from __future__ import annotations

from typing import Any

import pytest
import world
from levels.level_runs import VOCABULARY, load, run_engine, sequences
from levels.test_levels_engine import PADDING
from plan.test_plan_link import cluster, make

from nlscale.levels.passes import group_matrices, matrices_by_level, value_bytes
from nlscale.levels.spectrum import spectrum
from nlscale.plan.plan import make_plan

STEPS = 3
RUN = [
    "model.layers=2", "levels=[1,2]", "data.sequence_length=16", "train.global_batch=2",
    "train.steps=9", "optimizer.m3.every=2", "parallel.tensor=2",
]  # fmt: skip
RULES = [
    ["optimizer.rule=muon", "levels.spectrum.1.optimizer={rule: deep}"],
    ["optimizer.rule=m3", "levels.spectrum.1.optimizer={rule: adamw}", "train.dtype=bf16"],
    ["optimizer.rule=delta", "levels.spectrum.0.optimizer={rule: m3}"],
]


def run(rules: list[list[str]]) -> list[tuple[list[int], dict[int, list[float]]]]:
    """Bytes that this rank exchanged at each step, to itself too; and the work of the owners."""
    import torch.distributed as dist

    from nlscale.parallel.layout import process_groups
    from nlscale.train.loop import Trainer

    sent, send = [0], dist.all_to_all_single

    def count(arrived: Any, outgoing: Any, *rest: Any, **more: Any) -> Any:
        sent[0] += outgoing.nbytes
        return send(arrived, outgoing, *rest, **more)

    dist.all_to_all_single = count
    found = []
    for own in rules:
        config = load([*RUN, *own])
        with process_groups(config) as layout:
            levels = spectrum(config.levels, 32)
            trainer = Trainer.build(config, layout, levels, VOCABULARY)
            of_steps = []
            for step in range(1, STEPS + 1):
                sent[0] = 0
                trainer.take_step(sequences(config, step))
                of_steps.append(sent[0])
            owned: dict[int, list[float]] = {}
            for index, g in enumerate(trainer.optimizer.groups):
                inner: Any = g.optimizer.optimizer
                work = [0.0, 0.0]
                for matrix in getattr(getattr(inner, "exchange", None), "_matrices", []):
                    work[matrix.owner] += _newton_schulz(*matrix.shape)
                if any(work):
                    owned[index] = work
        found.append((of_steps, owned))
    return found


def _newton_schulz(out: int, into: int) -> float:
    """Of five iterations: x x^T, its square, and the product of both with x."""
    m, n = min(out, into), max(out, into)
    return 5 * 2 * (m * n * m + m * m * m + m * m * n)


def test_a_run_sends_and_owners_compute_what_is_planned() -> None:
    ranks = world.run(2, run, RULES)
    for index, own in enumerate(RULES):
        config = load([*RUN, *own])
        levels = spectrum(config.levels, 32)
        groups = group_matrices(config, levels, config.levels.stagger, range(2))
        planned = [0] * STEPS
        for g in groups:
            due = [step for step in range(1, STEPS + 1) if g.group.due(step)]
            for update, step in enumerate(due):
                values = g.values()
                planned[step - 1] += value_bytes(config) * values[update % len(values)]
        first, second = (found[index] for found in ranks)
        assert [a + b for a, b in zip(first[0], second[0], strict=True)] == planned, own
        assert first[1] == second[1]
        owned = list(first[1].values())
        for g, work in zip(groups, owned, strict=True):
            assert sum(work) == g.level.flops * len(g.depths) / sum(
                1 / c.every for c in g.level.calls
            )
            if g.level.turns == 1:
                assert g.longest(2) == [max(work)]


def test_matrices_that_lie_on_all_nodes_alike_send_what_is_planned() -> None:
    # Cut into parts much smaller than a matrix; of larger parts it matters who owns what.
    keys = ["parallel.shard_optimizer=all", "parallel.bucket_size=1000", "optimizer.rule=muon"]
    keys += ["model.layers=2", "levels=[1]", "data.sequence_length=16", "train.global_batch=4"]
    results = world.run(4, run_engine, [*keys, "train.steps=2"], ranks_per_node=2)
    assert results[0]["sent"] == pytest.approx(sum(results[0]["bytes_by_step"]), rel=PADDING)


def test_a_node_sends_its_part_of_the_matrices_to_the_others() -> None:
    keys = ["levels=[1,8]", "train.global_batch=32", "train.dtype=bf16", "optimizer.m3.every=4"]
    keys += ["parallel.tensor=2"]

    def planned(rule: str, shards: str) -> Any:
        overrides = [*keys, f"optimizer.rule={rule}", f"parallel.shard_optimizer={shards}"]
        return make_plan(make(*overrides), cluster(nodes=4), step_seconds=1.0)

    adamw, m3 = planned("adamw", "all"), planned("m3", "all")
    config = make(*keys, "optimizer.rule=m3")
    inside = [config.model.layers * own.elements for own in matrices_by_level(config)]
    values = 2 * (1 + 1 / 4) * (inside[0] + inside[1] / 8)
    assert m3.whole.inter_node_bytes_per_step == pytest.approx(2 * values / 4 * 3 / 4)
    assert m3.aligned.mean - adamw.aligned.mean == pytest.approx(m3.whole.inter_node_bytes_per_step)
    for found in (m3.aligned, m3.staggered):
        assert found.per_step.mean() == pytest.approx(m3.aligned.mean)
    assert m3.cycle == 4 * adamw.cycle and adamw.whole is None
    assert m3.sharding == planned("m3", "node").sharding

    of_node = cluster(nodes=4).gpus_per_node
    assert m3.whole.owners == 4 * of_node
    share = (of_node - 1) / (4 * of_node)
    assert m3.whole.in_node_bytes_per_step == pytest.approx(2 * values / (4 * of_node) * share)
    assert m3.whole.in_node_peak_bytes > m3.whole.in_node_bytes_per_step

    home = planned("m3", "matrices")
    assert home.whole.inter_node_bytes_per_step == 0 and home.aligned.mean == adamw.aligned.mean
    assert home.whole.owners == m3.whole.owners
    share = (of_node - 1) / of_node
    assert home.whole.in_node_bytes_per_step == pytest.approx(2 * values / (4 * of_node) * share)
    assert home.whole.to_model_flops == m3.whole.to_model_flops
    assert home.memory.largest.optimizer == m3.memory.largest.optimizer

    muon = planned("muon", "node")
    assert muon.aligned.mean == planned("adamw", "node").aligned.mean
    assert muon.whole.inter_node_bytes_per_step == 0
    share = (of_node - 1) / of_node
    values = 2 * (inside[0] + inside[1] / 8)
    assert muon.whole.in_node_bytes_per_step == pytest.approx(2 * values / of_node * share)
    assert [level.parameters for level in muon.whole.levels] == inside
    # every node computes the same, and a rank no less than its part
    by_level = matrices_by_level(make(*keys, "optimizer.rule=muon"))
    once = config.model.layers * (by_level[0].flops + by_level[1].flops / 8)
    assert muon.whole.newton_schulz_flops_per_step == pytest.approx(4 * once)
    tokens = config.train.global_batch * config.data.sequence_length
    assert muon.whole.to_model_flops == pytest.approx(
        4 * once / (sum(muon.flops.values()) * tokens)
    )

"""What a checkpoint comes to, and what each way of sharding the optimizer state does."""

from __future__ import annotations

import pytest
from plan.test_plan_link import cluster, make

from nlscale.cluster.machines import load_cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Sharding
from nlscale.plan.plan import make_plan

RECIPES = {
    "340m": "one-node-8-gpus",
    "1.3b": "two-nodes-16-gpus",
    "7b": "eight-nodes-64-gpus",
    "70b": "sixtyfour-nodes-512-gpus",
}


def test_nodes_share_what_they_all_hold() -> None:
    config = make("levels=[1,8]", "parallel.pipeline=2", "train.global_batch=32")
    found = make_plan(config, cluster(nodes=4))
    slow = found.levels[1].parameters
    assert found.checkpoint.bytes == 12 * found.parameters + 4 * slow
    assert found.checkpoint.host_bytes == found.checkpoint.bytes / 4
    assert found.checkpoint.resume_bytes == found.checkpoint.bytes


def test_windows_kept_exactly_are_stored_once_a_node() -> None:
    keys = ["levels=[1,8]", "train.global_batch=32"]
    once, each = (
        make_plan(make(*keys, f"checkpoint.pending={pending}"), cluster(nodes=4)).checkpoint
        for pending in ("canonical", "exact")
    )
    slow = make_plan(make(*keys), cluster(nodes=4)).levels[1].parameters
    assert each.bytes - once.bytes == 3 * 4 * slow
    assert each.inter_node_bytes == 0 < once.inter_node_bytes


@pytest.mark.parametrize("size", RECIPES)
def test_shipped_recipes_write_equal_files_and_read_them_once(size: str) -> None:
    config = recipe.load(f"recipes/hope-{size}.yaml", []).config
    machines = load_cluster(f"recipes/clusters/{RECIPES[size]}.yaml")
    found = make_plan(config, machines).checkpoint
    assert found.files == machines.ranks
    assert found.skew < 1.1
    assert found.reread < 1.3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharding_over_all_nodes_divides_the_state(dtype: str) -> None:
    keys = [f"train.dtype={dtype}", "levels=[1,8]", "train.global_batch=32"]
    plans = {
        way: make_plan(make(*keys, f"parallel.shard_optimizer={way.value}"), cluster(nodes=4))
        for way in Sharding
    }
    node, spread = plans[Sharding.node], plans[Sharding.all]
    for found in plans.values():
        assert found.sharding == node.sharding
        way = found.sharding[found.shards]
        assert way.optimizer_bytes == found.memory.largest.optimizer
        assert way.mean_bytes_per_step == pytest.approx(found.aligned.mean)
    assert spread.memory.largest.optimizer == node.memory.largest.optimizer / 4
    share = {"fp32": 1.0, "bf16": 0.75}[dtype]
    assert spread.aligned.mean == pytest.approx(share * node.aligned.mean)


@pytest.mark.parametrize(("rule", "least", "most"), [("adamw", 1 / 3, 1 / 2), ("m3", 0.42, 0.55)])
def test_updated_parameters_and_matrices_cross_when_nothing_hides_them(
    rule: str, least: float, most: float
) -> None:
    keys = ["levels=[1,8]", "train.global_batch=32", "train.dtype=bf16"]
    keys += ["parallel.shard_optimizer=all", "parallel.bucket_size=300", f"optimizer.rule={rule}"]
    found = make_plan(make(*keys), cluster(nodes=4), step_seconds=1e6)
    assert found.exposure is not None
    run, seconds = found.exposure.run, found.cluster.link_seconds(found.aligned.mean)
    assert sum(run.exposed) + sum(run.hidden) == pytest.approx(seconds)
    # 2 of 4 + 2 bytes, or with matrices 3 of 7, and the last bucket
    assert least * seconds <= sum(run.exposed) < most * seconds

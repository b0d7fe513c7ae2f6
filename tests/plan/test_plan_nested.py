"""What copies of MLPs, of the nested form of CMS, take and send, as planned."""

from __future__ import annotations

import numpy as np
import pytest

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.levels.notes import slow_level_warnings
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import mlp_hidden
from nlscale.plan import make_plan
from nlscale.plan.largest import slow_on_host
from nlscale.scaling.law.setting import setting_of

CLUSTER = Cluster("two", 2, 4, 10.0, 80.0, 100.0)


def make(*overrides: str) -> Config:
    sizes = ["model.d_model=32", "model.heads=2", "model.layers=4", "model.vocabulary=40"]
    run = ["train.global_batch=16", "train.micro_batch=2", "train.steps=100"]
    return recipe.load(None, ["data.dir=none", *sizes, *run, *overrides]).config


NESTED = ("model.cms=nested", "levels=[2,4,{period: 8, copy_rate: 0.25}]")


@pytest.mark.parametrize(("way", "sharing"), [("node", 4), ("all", 8)])
def test_copies_take_four_bytes_of_each_parameter_and_send_nothing(way: str, sharing: int) -> None:
    shard = f"parallel.shard_optimizer={way}"
    nested, alone = (make_plan(make(shard, *keys), CLUSTER) for keys in (NESTED, ("levels=[2]",)))
    copied = 2 * 4 * 3 * 32 * mlp_hidden(make(*NESTED))[0]  # of two copies, in four blocks
    more = nested.memory.largest.optimizer - alone.memory.largest.optimizer
    assert more == pytest.approx(4 * copied / sharing)
    assert nested.checkpoint.bytes - alone.checkpoint.bytes == 4 * copied
    assert nested.checkpoint.inter_node_bytes == alone.checkpoint.inter_node_bytes
    assert nested.parameters == alone.parameters and nested.flops == alone.flops
    for way_ in ("aligned", "staggered"):
        ours, theirs = getattr(nested, way_), getattr(alone, way_)
        assert ours.mean == theirs.mean and ours.peak == theirs.peak
        assert np.all(ours.bytes_per_level[1:] == 0)
    said = nested.to_plain()["levels"]
    assert [own["copy_rate"] for own in said] == [None, 0.5, 0.25]
    assert [own["updates"] for own in said] == [51, 25, 12]  # the first's last window is short
    assert [own["reductions"] for own in said] == [51, 0, 0]


def test_copies_of_each_tensor_rank_are_of_its_part() -> None:
    spread = ("parallel.tensor=2", "parallel.pipeline=2")
    nested, alone = (make_plan(make(*spread, *keys), CLUSTER) for keys in (NESTED, ("levels=[2]",)))
    copied = 2 * 2 * 3 * 32 * mlp_hidden(make(*NESTED))[0] / 2  # two blocks, half of each
    own, other = (plan.memory.ranks[0].optimizer for plan in (nested, alone))
    assert own - other == pytest.approx(4 * copied / 2)  # two data-parallel ranks a node


def test_what_is_said_of_copies() -> None:
    config = make(*NESTED)
    assert setting_of(config, levels_of(config)) == ("2; 4 copy (rate 0.5); 8 copy (rate 0.25)")
    # few updates of a copy are no sign that something learns little; none are
    late = make("model.cms=nested", "levels=[1,50,200]")
    (line,) = slow_level_warnings(late, levels_of(late))
    assert "holds a copy that is due after 200 steps, and the run has 100" in line


def test_what_could_be_in_host_memory_leaves_out_what_has_copies() -> None:
    config = slow_on_host(make(*NESTED))
    assert [entry.memory.value for entry in config.levels.spectrum] == ["hbm"] * 3

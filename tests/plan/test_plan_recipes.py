"""The recipes of model sizes: each fits the cluster that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.units import human_count
from nlscale.config.vocabulary import head_dim
from nlscale.plan import load_cluster, make_plan
from nlscale.plan.advice import does_not_fit
from nlscale.plan.largest import largest, of_size, slow_on_host, state_on_gpu

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "340m": 340e6, "340m-muon": 340e6, "760m": 760e6, "1.3b": 1.3e9, "1.3b-muon": 1.3e9,
    "7b": 7e9, "36b": 36e9, "70b": 70e9,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_fits_the_cluster_that_it_names(size: str) -> None:
    path = RECIPES / f"hope-{size}.yaml"
    text = path.read_text()
    header = re.match(r"# Hope with (\S+) parameters on (\S+) tokens", text)
    cluster = re.search(r"^# Cluster: (\S+)$", text, re.MULTILINE)
    assert header and cluster
    config = recipe.load(path).config
    plan = make_plan(config, load_cluster(RECIPES.parent / cluster[1]))
    assert plan.fits and plan.pipeline.bubble < 0.1 and plan.pipeline.imbalance < 1.1
    assert human_count(plan.parameters) == header[1]
    assert plan.parameters == pytest.approx(SIZES[size], rel=0.05)
    assert head_dim(config.model) in (64, 128)
    assert human_count(plan.steps * plan.tokens_per_step) == header[2]
    assert [level.period for level in plan.levels] == [1, 4, 16, 64] and not plan.warnings


@pytest.mark.parametrize("size", ["340m", "1.3b"])
def test_the_recipe_with_muon_is_the_other_but_for_its_rule(size: str) -> None:
    plain, muon = (
        recipe.to_plain(recipe.load(RECIPES / f"hope-{name}.yaml").config)
        for name in (size, f"{size}-muon")
    )
    assert muon["optimizer"]["rule"] == "muon"
    muon["optimizer"]["rule"], muon["run"]["dir"] = "adamw", plain["run"]["dir"]
    assert muon == plain


def test_36b_is_the_largest_of_the_shape_of_7b_on_one_node() -> None:
    cluster = load_cluster(RECIPES / "clusters" / "one-node-8-gpus.yaml")
    keys = ["parallel.tensor=8", "parallel.pipeline=1", "train.micro_batch=1"]
    shape = recipe.load(RECIPES / "hope-7b.yaml", [*keys, "train.recompute=[cms,mixer]"]).config
    config = recipe.load(RECIPES / "hope-36b.yaml").config
    _, host = largest(shape, cluster)
    assert host is not None and host.layers == config.model.layers
    assert config.model == of_size(shape, host.layers).model
    assert config.levels == slow_on_host(shape).levels
    assert set(config.train.recompute) == set(shape.train.recompute)
    assert not make_plan(state_on_gpu(config), cluster).fits


def test_the_largest_is_refused_on_one_node() -> None:
    config = recipe.load(RECIPES / "hope-70b.yaml", ["parallel.pipeline=1"]).config
    plan = make_plan(config, load_cluster(RECIPES / "clusters" / "one-node-8-gpus.yaml"))
    assert not plan.fits
    says = does_not_fit(plan, config)
    assert "most of it optimizer, 94.9 GiB" in says and "use more GPUs" in says

"""What outer steps and local levels take and send, as planned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import world
from checkpoint.resume_runs import checkpoint, train
from levels.level_runs import VOCABULARY

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.notes import approximate, slow_level_warnings
from nlscale.levels.spectrum import planned_outer_steps, spectrum, sync_group
from nlscale.model.sizes import level_parameters
from nlscale.plan import make_plan, traffic
from nlscale.plan.checkpoint import checkpoint_plan
from nlscale.plan.traffic import cycle_steps

LOCAL = "{{period: {}, local: true, outer: {{every: {}}}}}"


def make(*overrides: str) -> Config:
    sizes = ["model.d_model=32", "model.heads=2", "model.layers=5", "model.vocabulary=40"]
    return recipe.load(None, ["data.dir=none", *sizes, *overrides]).config


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    "levels", [f"[{LOCAL.format(1, 6)}]", f"[1,{LOCAL.format(3, 4)},4]", f"[{LOCAL.format(2, 1)}]"]
)
def test_a_local_level_sends_once_an_outer_step(levels: str, stagger: bool) -> None:
    config = make(f"levels={levels}", "levels.spectrum.0.wire=bf16")
    spectrum_ = spectrum(config.levels, 1)
    nodes, cycle, layers = 3, cycle_steps(spectrum_), config.model.layers
    planned = traffic(config, spectrum_, 0, nodes, stagger)
    expected = np.zeros((len(spectrum_), cycle))
    for index, (entry, held) in enumerate(
        zip(config.levels.spectrum, level_parameters(config, 0), strict=True)
    ):
        period = int(str(entry.period).split()[0])
        longest = period * (entry.outer.every if entry.local else 1)
        norm = 32 * (index == 0)  # the last one, in the last block
        for step, depth in itertools.product(range(1, cycle + 1), range(layers)):
            if step % longest == (depth * longest // layers if stagger else 0):
                block = (held - norm) // layers + norm * (depth == layers - 1)
                expected[index, step - 1] += 2 * 2 / 3 * (2 if index == 0 else 4) * block
    np.testing.assert_allclose(planned.bytes_per_level, expected)
    assert planned.mean == pytest.approx(expected.sum(axis=0).mean())


def test_the_plan_of_diloco_says_what_it_saves_and_what_that_costs() -> None:
    cluster = Cluster("two", 2, 4, 10.0, 80.0, 100.0)
    keys = ["train.global_batch=16", "train.micro_batch=2", "train.steps=1000"]
    plain = make_plan(make(*keys), cluster).to_plain()
    config = make(*keys, f"levels=[{LOCAL.format(1, 30)}]")
    found = make_plan(config, cluster).to_plain()
    assert found["ratio"]["plain_to_mean"] == pytest.approx(30)
    assert found["ratio"]["peak_staggered_to_plain"] < 0.5, "five blocks, each at its own step"
    (level,) = found["levels"]
    assert (level["outer_every"], level["local"], level["updates"]) == (30, True, 1000)
    (link,) = found["exposure"]["levels"]
    assert link["hidden_link_seconds"] == 0, "outer steps follow the backward pass"
    assert link["exposed_link_seconds"] == pytest.approx(level["link_seconds_per_step"])
    more = found["memory"]["ranks"][0]["optimizer"] - plain["memory"]["ranks"][0]["optimizer"]
    assert more == 8 * level["parameters"] / 4
    assert set(found["sharding"]) == {"node"}
    assert any("it is approximate" in line for line in found["warnings"])


def test_a_checkpoint_of_local_levels_has_the_planned_bytes(tmp_path: Path) -> None:
    overrides = ["levels=[{period: 1, local: true, outer: {every: 4}}]", "levels.stagger=false"]
    overrides += ["model.layers=2", "train.steps=9", "train.global_batch=4"]
    world.run(2, train, overrides, tmp_path, (5,), ranks_per_node=1)
    found = checkpoint(tmp_path, 5)
    config = recipe.load(None, _keys(found.state["config"])).config
    cluster = Cluster("two", 2, 1, 10.0, 80.0, None)
    planned = checkpoint_plan(config, spectrum(config.levels, 1), VOCABULARY, cluster, 2)
    assert planned.bytes == sum(info.bytes for info in found.tensors().values())
    assert planned.inter_node_bytes == 0


def _keys(config: dict[str, Any]) -> list[str]:
    """A saved configuration as overrides."""
    model = {k: v for k, v in config["model"].items() if not isinstance(v, dict) and v is not None}
    keys = [f"model.{key}={value}" for key, value in model.items()]
    levels = config["levels"]["spectrum"]
    return ["data.dir=none", "train.dtype=fp32", *keys,
            f"levels=[{LOCAL.format(1, levels[0]['outer']['every'])}]"]  # fmt: skip


@pytest.mark.parametrize("entry", [LOCAL.format(2, 3), "{period: 3, outer: {every: 2}}"])
def test_outer_steps_of_a_run_are_those_due_and_what_joins_local_nodes_at_its_end(
    entry: str,
) -> None:
    for steps, stagger in itertools.product(range(1, 20), ["true", "false"]):
        config = make(f"levels=[1,{entry}]", f"levels.stagger={stagger}", f"train.steps={steps}")
        level = spectrum(config.levels, 1)[1]
        for depth in range(config.model.layers):
            group = sync_group(level, depth, config.model.layers, stagger == "true")
            due = sum(group.outer_due(step, level.outer) for step in range(1, steps + 1))
            ends = level.local and not group.outer_due(steps, level.outer)
            assert group.outer_steps(steps, level) == due + ends


def test_an_outer_step_that_never_comes_is_planned_in_little_memory_and_warned_about() -> None:
    config = make(f"levels=[1,{LOCAL.format(16, 10**9)}]", "train.steps=4000")
    levels = spectrum(config.levels, 1)
    assert cycle_steps(levels) <= 10**6
    assert traffic(config, levels, 0, 2, stagger=True).bytes_per_level[1].sum() == 0
    (line,) = slow_level_warnings(config, levels)
    assert line.endswith("250 are due in 4,000 steps; train longer, or give a smaller outer.every")
    fewer = make(f"levels=[1,{LOCAL.format(16, 250)}]", "train.steps=4000")
    assert slow_level_warnings(fewer, spectrum(fewer.levels, 1)) == []


def test_outer_steps_are_those_of_blocks_that_have_the_level() -> None:
    slow = "{period: 1, parts: [head], local: true, outer: {every: 10}}"
    config = make(f"levels=[1,{slow}]", "train.steps=17")
    # The head is at depth 4 of 5: at step 8, and with the end; depth 2 would be at 4, 14 and then.
    assert planned_outer_steps(config, spectrum(config.levels, 1)[1]) == 2


def test_every_level_beside_a_local_one_is_said_to_be_approximate() -> None:
    levels = spectrum(make(f"levels=[1,{LOCAL.format(4, 8)}]").levels, 1)
    assert approximate(levels, crosses=False) == []
    fast, slow = approximate(levels, crosses=True)
    assert fast.startswith("level 'level0' takes its gradients where the nodes' weights differ in")
    assert slow.startswith("level 'level1' is local, each node makes 8 updates of its own")
    outer = make("levels=[1,4]", "levels.spectrum.1.outer.every=8")
    assert approximate(spectrum(outer.levels, 1), crosses=True) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["levels.spectrum.1.local=true"], "outer.every is null, which makes none"),
        (["levels.spectrum.0.outer.momentum=0.5"], "a momentum of 0.5 and a learning_rate of 0.7"),
        (["levels.spectrum.0.outer.every=0"], "must be above 0"),
        (["levels.spectrum.0.outer.momentum=1"], "must be at least 0 and below 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        spectrum(make("levels=[1,4]", *overrides).levels, 1)


@pytest.mark.parametrize("way", ["all", "matrices"])
def test_nodes_that_update_for_themselves_share_no_optimizer_state(way: str) -> None:
    config = make(f"levels=[1,{LOCAL.format(4, 8)}]", f"parallel.shard_optimizer={way}",
                  "train.global_batch=16")  # fmt: skip
    with pytest.raises(UserError, match=r"levels.spectrum.1 is local, which each node updates by"):
        make_plan(config, Cluster("two", 2, 4, 10.0, 80.0, None))

"""The plan's traffic against a step-by-step count, and its groups against a real model's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import world

from nlscale.config import recipe
from nlscale.config.vocabulary import Config, Reduction
from nlscale.errors import UserError
from nlscale.levels.groups import group_parameters, parameters_by_depth
from nlscale.levels.spectrum import spectrum, sync_group
from nlscale.model.sizes import level_parameters
from nlscale.model.stages import stage_blocks
from nlscale.plan import Cluster, make_plan, traffic
from nlscale.plan.traffic import cycle_steps

VOCABULARY = 40


def make(*overrides: str) -> Config:
    return recipe.load(
        None,
        ["data.dir=none", "model.d_model=32", "model.heads=2", "model.layers=5", *overrides],
    ).config


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    "levels", ["[1]", "[1,4,16]", "[1,3,4]", "[2,2,6]", "[1,{period: 5, hidden: 16},7]"]
)
def test_every_step_is_what_its_due_blocks_send(levels: str, stagger: bool) -> None:
    config = make(f"levels={levels}", f"levels.stagger={stagger}")
    spectrum_ = spectrum(config.levels, 1)
    nodes, cycle = 3, cycle_steps(spectrum_)
    planned = traffic(config, spectrum_, VOCABULARY, nodes)

    d, layers = config.model.d_model, config.model.layers
    sizes = level_parameters(config, VOCABULARY)
    expected = np.zeros((len(spectrum_), cycle))
    for step, level, depth in itertools.product(range(1, cycle + 1), spectrum_, range(layers)):
        held = sizes[level.index]
        if level.index == 0:
            held -= 2 * VOCABULARY * d + d  # embedding; head and last norm
        held //= layers
        if level.index == 0:
            held += VOCABULARY * d * (depth == 0) + (VOCABULARY + 1) * d * (depth == layers - 1)
        if sync_group(level, depth, layers, stagger).due(step):
            expected[level.index, step - 1] += 2 * 2 / 3 * 4 * held
    np.testing.assert_allclose(planned.bytes_per_level, expected)
    assert planned.peak == pytest.approx(expected.sum(axis=0).max())
    assert planned.mean == pytest.approx(expected.sum(axis=0).mean())


@pytest.mark.parametrize("stagger", [False, True])
def test_every_step_sends_all_parameters_whatever_the_periods(stagger: bool) -> None:
    config = make("levels=[1,4,16]")
    levels = spectrum(config.levels, 1)
    plain = traffic(config, levels, VOCABULARY, 2, stagger, Reduction.every_step)
    total = 4 * sum(level_parameters(config, VOCABULARY))
    assert set(plain.per_step) == {total}
    assert plain.mean == plain.peak == total


def test_four_equal_levels_send_a_third_and_staggering_takes_the_peak() -> None:
    config = make(
        "levels=[{period: 1, hidden: 64},{period: 4, hidden: 3200},{period: 16, hidden: 3200},"
        "{period: 64, hidden: 3200}]",
        "model.layers=64",
    )
    sizes = level_parameters(config, 0)
    width = (sizes[1] - sizes[0]) // (3 * 32 * 64) + 64
    config.levels.spectrum[0].hidden = width  # so that mixers and first MLPs are as large
    levels = spectrum(config.levels, 1)
    plain = 4 * sum(level_parameters(config, 0))
    staggered = traffic(config, levels, 0, 2, stagger=True)
    assert plain / staggered.mean == pytest.approx(3.01, abs=0.01)
    assert staggered.peak / plain == pytest.approx(0.33, abs=0.01)
    assert traffic(config, levels, 0, 2, stagger=False).peak == plain


def test_the_mean_is_exact_where_periods_hardly_divide_each_other() -> None:
    config = make("levels=[1,997,1009,1013]")
    levels = spectrum(config.levels, 1)
    assert cycle_steps(levels) < 1_100_000
    sizes = level_parameters(config, VOCABULARY)
    planned = traffic(config, levels, VOCABULARY, 2)
    for level in levels:
        assert planned.mean_per_level[level.index] == pytest.approx(
            4 * sizes[level.index] / level.period
        )


@pytest.mark.parametrize(
    ("nodes", "per_node", "tensor", "pipeline", "virtual"),
    [(4, 2, 1, 1, 1), (4, 2, 1, 2, 1), (4, 2, 2, 4, 1), (2, 4, 2, 4, 1), (4, 4, 2, 2, 2)],
)
def test_with_a_pipeline_bytes_are_the_mean_over_nodes(
    nodes: int, per_node: int, tensor: int, pipeline: int, virtual: int
) -> None:
    config = make(
        f"model.vocabulary={VOCABULARY}", "levels=[1,4]", "train.global_batch=64",
        "train.micro_batch=1", "data.sequence_length=16", f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}", f"parallel.virtual_stages={virtual}",
        f"parallel.sequence={'true' if tensor > 1 else 'false'}", "train.dtype=bf16",
    )  # fmt: skip
    plan = make_plan(config, Cluster("c", nodes, per_node, 1.0, 80.0))

    # every rank by itself: tensor ranks are numbered first, then data, then pipeline
    data = nodes * per_node // (tensor * pipeline)
    ranks = list(itertools.product(range(pipeline), range(data), range(tensor)))
    node = {place: i // per_node for i, place in enumerate(ranks)}
    stages = stage_blocks(config, VOCABULARY)
    held = np.array(parameters_by_depth(config, VOCABULARY)).sum(axis=0)
    gradients = activations = 0.0
    for p, d, t in ranks:
        blocks = [depth for stage in stages[p::pipeline] for depth in stage]
        spanned = {node[p, other, t] for other in range(data)}
        in_node = sum(node[p, other, t] == node[p, d, t] for other in range(data))
        n = len(spanned)
        gradients += 2 * (n - 1) / n * 4 * held[blocks].sum() / tensor / in_node
        for stage in range(p, len(stages), pipeline):
            for to in (stage - 1, stage + 1):  # gradients back, activations on
                if 0 <= to < len(stages) and node[to % pipeline, d, t] != node[p, d, t]:
                    activations += 64 / data * 16 * config.model.d_model * 2 / tensor
    assert plan.plain == pytest.approx(gradients / nodes)
    assert plan.activations == pytest.approx(activations / nodes)
    assert plan.aligned.peak == pytest.approx(plan.plain)


def test_data_parallel_groups_that_straddle_nodes_unevenly_are_refused() -> None:
    config = make(
        "model.vocabulary=40", "parallel.pipeline=4", "train.global_batch=24",
        "train.micro_batch=1",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"6 GPUs .* do not spread evenly over nodes of 8"):
        make_plan(config, Cluster("c", 3, 8, 1.0, 80.0))


MODELS = [
    [f"model.mixer={mixer}", f"model.cms={cms}", f"levels.stagger={stagger}", "levels=[1,4,6]"]
    for mixer, cms, stagger in [
        ("hope", "sequential", True),
        ("hope", "independent", False),
        ("hope-pure", "sequential", True),
        ("gated-delta", "independent", True),
        ("attention", "sequential", True),
    ]
]
MODELS += [
    [f"model.cms={cms}", "levels=[{parts: [cms, head]},{period: 3, parts: [embedding, norms]},"
     "{period: 5, parts: [mixer]}]"]
    for cms in ("sequential", "independent")
]  # fmt: skip


def real_groups() -> list[dict[tuple[int, int], int]]:
    from nlscale.levels.optimizers import split_by_group
    from nlscale.model.decoder import Decoder
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    found = []
    for overrides in MODELS:
        config = make(*overrides)
        with process_groups(config):
            model = Decoder(config, megatron_config(config), VOCABULARY)
            split = split_by_group(config, spectrum(config.levels, 1), [model])
        found.append(
            {(g.level, g.phase): sum(p.numel() for p in ps.values()) for g, ps in split.items()}
        )
    return found


def test_groups_are_those_of_the_real_model() -> None:
    for overrides, real in zip(MODELS, world.run(1, real_groups)[0], strict=True):
        config = make(*overrides)
        levels = spectrum(config.levels, 1)
        planned = group_parameters(config, levels, VOCABULARY, config.levels.stagger)
        assert {(g.level, g.phase): n for g, n in planned.items()} == real, overrides

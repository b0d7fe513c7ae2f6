"""Plans of runs in stages: each stage as the run that has only such steps, and the run of all."""

from __future__ import annotations

import io

import pytest
from plan.test_plan_link import cluster, make
from rich.console import Console

from nlscale.config.curriculum import at_stage, curriculum
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.flops import flops_per_token, mean_flops_per_token, steps_flops
from nlscale.plan import make_plan
from nlscale.plan.checks import check_sizes
from nlscale.plan.plan import memory_on
from nlscale.plan.tables import print_plan

STAGES = [
    "model.mixer=attention",
    "train.steps=100",
    "train.global_batch=[{from: 0%, size: 8}, {from: 40%, size: 16}]",
    "data.stages=[{from: 60%, sequence_length: 512}, {from: 90%, sequence_length: 32}]",
    "parallel.pipeline=2",
]


def stages_alone(config: Config) -> list[Config]:
    return [at_stage(config, stage) for stage in curriculum(config)]


def test_a_stage_is_planned_as_a_run_of_its_own() -> None:
    config = make(*STAGES)
    found = make_plan(config, cluster())
    assert [own.stage.first_step for own in found.stages] == [0, 40, 60, 90]
    for own, entry, alone in zip(
        found.stages, found.to_plain()["stages"], stages_alone(config), strict=True
    ):
        one = make_plan(alone, cluster())
        assert own.memory == one.memory and own.pipeline == one.pipeline
        assert own.exposure == one.exposure and own.flops == one.flops
        assert entry["memory_bytes"] == one.memory.largest.total
        assert entry["activation_bytes_per_step"] == one.activations
        assert entry["tokens_per_step"] == one.tokens_per_step
        assert found.aligned.mean == one.aligned.mean, "gradients do not know of the batch"


def test_the_run_is_all_of_its_stages() -> None:
    config = make(*STAGES, "parallel.pipeline=1")
    found = make_plan(config, cluster())
    tokens = [40 * 8 * 64, 20 * 16 * 64, 30 * 16 * 512, 10 * 16 * 32]
    assert found.tokens == sum(tokens)
    flops = [
        count * flops_per_token(alone, 256)
        for count, alone in zip(tokens, stages_alone(config), strict=True)
    ]
    assert found.run_flops == pytest.approx(sum(flops))
    assert steps_flops(config, 256, 0, 100) == pytest.approx(sum(flops))
    assert steps_flops(config, 256, 30, 70) == pytest.approx(flops[0] / 4 + flops[1] + flops[2] / 3)
    assert mean_flops_per_token(config, 256) == pytest.approx(sum(flops) / sum(tokens))
    assert found.run_seconds == pytest.approx(
        sum(own.stage.steps * (own.computes + own.waits) for own in found.stages)
    )
    assert all(own.waits > 0 for own in found.stages)


def test_a_gpu_must_have_the_memory_for_every_stage() -> None:
    config = make(*STAGES)
    found = make_plan(config, cluster())
    needs = [make_plan(alone, cluster()).memory.largest.total for alone in stages_alone(config)]
    assert found.memory.largest.total == max(needs) == needs[2]
    assert found.fullest is found.stages[2]
    assert memory_on(config, cluster()).largest.total == max(needs)


def test_seconds_that_were_timed_are_those_of_the_fullest_stage() -> None:
    found = make_plan(make(*STAGES), cluster(), step_seconds=2.0)
    for own in found.stages:
        share = own.flops_per_step / found.stages[2].flops_per_step
        assert own.computes == pytest.approx(2.0 * share)


def test_the_table_has_a_line_for_each_stage() -> None:
    def printed(*overrides: str) -> str:
        out = io.StringIO()
        print_plan(make_plan(make(*overrides), cluster()), Console(file=out, width=100))
        return out.getvalue()

    said = printed(*STAGES)
    lines = [line.split() for line in said.splitlines()]
    assert ["1", "40", "8", "64", "512", "20.5k"] in [line[:6] for line in lines]
    assert ["61", "30", "16", "512", "8.19k", "246k"] in [line[:6] for line in lines]
    assert "stage that begins with step 61, in which a GPU needs most memory" in " ".join(
        said.split()
    )
    assert "stage" not in printed("train.steps=100").partition("Pipeline")[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.global_batch=[{from: 0%, size: 8}, {from: 40%, size: 12}]"],
            r"stage 2 of the run \(from step 41: 12 sequences of 64 tokens\): train.global_batch "
            r"12 is not divisible by train.micro_batch 2 x 4 data-parallel ranks; use 8 or 16",
        ),
        (
            [
                "parallel.tensor=4",
                "parallel.sequence=true",
                "data.stages=[{from: 90%, sequence_length: 66}]",
            ],
            r"stage 2 of the run \(from step 91: .*\): data.sequence_length 66 is not divisible",
        ),
        (
            [
                "parallel.pipeline=2",
                "parallel.virtual_stages=2",
                "train.global_batch=[{from: 0%, size: 8}, {from: 40%, size: 12}]",
            ],
            r"stage 2 of the run .* makes 3 micro batches a rank",
        ),
    ],
)
def test_every_stage_must_divide(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_sizes(make("train.steps=100", *overrides), 4)


def test_a_larger_micro_batch_that_is_advised_divides_every_stage() -> None:
    sizes = "train.global_batch=[{from: 0%, size: 6}, {from: 40%, size: 8}]"
    found = make_plan(make(sizes, "train.micro_batch=1"), cluster(nodes=1, gpus=1))
    said = next(line for line in found.advice if "programs leave" in line)
    assert "train.micro_batch=2 runs 8 and fits" in said

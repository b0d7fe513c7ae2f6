"""Whether a micro batch fills a GPU, and what is advised where it does not."""

from __future__ import annotations

import pytest

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import MIXERS, Config
from nlscale.model.mixers.facts import MicroBatch
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.table import mixer
from nlscale.plan.plan import make_plan, memory_on
from nlscale.plan.programs import serial_programs

NODE = Cluster("node", 1, 8, 3200.0, 80.0)


def make(*overrides: str) -> Config:
    sizes = ["model.layers=24", "model.d_model=2048", "model.heads=16", "model.vocabulary=32000"]
    batch = ["data.sequence_length=4096", "train.global_batch=128", "train.micro_batch=1"]
    of_run = ["data.dir=none", "train.dtype=bf16", "levels=[1]"]
    return recipe.load(None, [*of_run, *sizes, *batch, *overrides]).config


@pytest.mark.parametrize("name", MIXERS)
def test_programs_are_sequences_by_local_heads_where_kernels_scan_a_memory(name: str) -> None:
    config = make(f"model.mixer={name}", "parallel.tensor=2", "train.micro_batch=4")
    facts = mixer(name)
    fused = isinstance(facts, MemoryFacts) and facts.fused(MicroBatch(config))
    assert serial_programs(config) == (4 * 16 // 2 if fused else None)
    for torch_form in ("train.kernels=false", "train.dtype=fp32"):
        slow = make(f"model.mixer={name}", torch_form)
        assert serial_programs(slow) is None and not make_plan(slow, NODE).advice


@pytest.mark.parametrize(
    ("layers", "advised"), [(2, 8), (24, 4), (100, None)], ids=["fills", "fits", "full"]
)
def test_a_larger_micro_batch_is_advised_that_fits_and_divides(
    layers: int, advised: int | None
) -> None:
    depth = f"model.layers={layers}"
    plan = make_plan(make(depth), NODE)
    (said,) = plan.advice
    assert plan.serial_programs == plan.to_plain()["serial_programs"] == 16
    if advised is None:
        assert "no larger train.micro_batch fits" in said
        assert not memory_on(make(depth, "train.micro_batch=2"), NODE).fits
        return
    assert f"train.micro_batch={advised} runs {advised * 16} and fits" in said
    assert memory_on(make(depth, f"train.micro_batch={advised}"), NODE).fits
    twice = make(depth, f"train.micro_batch={2 * advised}")
    assert advised * 16 >= 128 or not memory_on(twice, NODE).fits
    assert not make_plan(make("model.layers=2", "train.micro_batch=8"), NODE).advice


def test_a_vocabulary_whose_rows_are_not_aligned_is_rounded_up() -> None:
    overrides = ["model.layers=2", "train.micro_batch=16", "parallel.tensor=2"]
    assert not make_plan(make(*overrides, "model.vocabulary=32032"), NODE).advice
    (said,) = make_plan(make(*overrides, "model.vocabulary=32016"), NODE).advice
    assert "16,008 logits of a row" in said and "use model.vocabulary=32032" in said


def test_of_a_pipeline_the_advice_says_what_it_costs() -> None:
    config = make("model.layers=4", "parallel.pipeline=2", "parallel.tensor=2")
    (said,) = make_plan(config, NODE).advice
    larger = make("model.layers=4", "parallel.pipeline=2", "parallel.tensor=2",
                  "train.micro_batch=16")  # fmt: skip
    waits = make_plan(larger, NODE).pipeline.bubble
    assert f"=16 runs 128 and fits; a rank of the pipeline then waits {waits:.1%}" in said

"""What a step does on GPUs, as far as it can be seen without one (see tests/gpu.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import gpu
import numpy as np
import pytest
import world
from levels.level_runs import SEPARATOR, VOCABULARY, load

from nlscale import cli
from nlscale.levels.spectrum import spectrum
from nlscale.ops.documents import Documents
from nlscale.ops.transfer import to_device
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer

LENGTH, LAYERS = 32, 2
SIZES = [
    "levels=[1,3]",
    "train.steps=3",
    "train.dtype=bf16",
    "model.d_model=128",
    "model.heads=2",
    "model.memory.chunk=16",
    f"model.layers={LAYERS}",
    f"data.sequence_length={LENGTH}",
]
LOSS = {"statistics_kernel": 1, "gradient_kernel": 1}
"""Launches a micro batch."""
READS = {"writes_kernel": 2, "reads_kernel": 1, "reads_backward_kernel": 1}
S = {"main_kernel": 1, "main_backward_kernel": 1, "writes_backward_kernel": 1}
PI = {"pi_kernel": 1, "pi_backward_kernel": 1, "inputs_backward_kernel": 1}
HOPE = {**READS, **S, **PI}
"""Launches a micro batch and layer."""


def launched_in_each_step(overrides: list[str], rank: int, ranks: int) -> list[Counter[str]]:
    """Of three steps, with an update of the slow level in the first and the last."""
    from nlscale.step import trainer as module

    module.check_kernels = lambda *args: None  # compares numbers
    per_node = f"parallel.ranks_per_node={max(1, ranks // 2)}"
    config, found = load([*SIZES, *overrides, per_node]), []
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH + 1))
    tokens[0, LENGTH // 3] = SEPARATOR
    with gpu.stand_in(rank, ranks), process_groups(config) as layout:
        levels = spectrum(config.levels, tokens_per_step=100)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        documents = None
        if config.data.document_mask:
            documents = Documents.of(tokens[:, :-1], SEPARATOR, 16, layout.device)
        rows = to_device(tokens, layout.device)
        micro_batches = config.train.global_batch // layout.data_size
        batches = [Batch(rows[:, :-1], rows[:, 1:], 1, documents)] * micro_batches
        for _ in range(config.train.steps):
            gpu.launches.clear()
            trainer.take_step(batches)
            found.append(Counter({k: n // micro_batches for k, n in gpu.launches.items()}))
    return found


@dataclass(frozen=True)
class Case:
    overrides: str = ""
    a_layer: dict[str, int] = field(default_factory=lambda: HOPE)
    layers: int = LAYERS
    """That this rank holds."""
    loss: dict[str, int] = field(default_factory=lambda: LOSS)
    rank: int = 0
    ranks: int = 1


HALF = LAYERS // 2
CASES = [
    Case(),
    Case("model.mixer=hope-pure", {**READS, **PI}),
    Case("model.mixer=gated-delta", {**READS, **S}),
    Case("model.mixer=attention", {}),
    Case("data.document_mask=true"),
    Case("data.document_mask=true model.mixer=attention", {}),
    Case("model.cms=independent"),
    Case("train.dtype=fp32", {}),
    Case("train.kernels=false", {}, loss={}),
    Case("parallel.tensor=2 parallel.sequence=true", rank=5, ranks=8),
    Case("parallel.tensor=2 levels.reduction=every-step", ranks=8),
    Case("parallel.pipeline=2 parallel.overlap=true", HOPE, HALF, {}, ranks=8),
    Case("parallel.pipeline=2", HOPE, HALF, rank=7, ranks=8),
    Case("model.layers=4 parallel.pipeline=2 parallel.virtual_stages=2", rank=7, ranks=8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.overrides} rank {case.rank}")
def test_a_step_stays_on_the_gpu_and_runs_through_the_kernels(case: Case) -> None:
    few = [f"train.global_batch={max(2, case.ranks)}"]
    given = (few + case.overrides.split(), case.rank, case.ranks)
    (steps,) = world.run(1, launched_in_each_step, *given)
    want = Counter({kernel: n * case.layers for kernel, n in case.a_layer.items()} | case.loss)
    assert steps == [want] * 3


@pytest.mark.parametrize("kernels", [True, False])
def test_what_crosses_as_integers_is_packed_by_kernels(kernels: bool) -> None:
    keys = ["levels=[{period: 1, wire: int8}, {period: 3, wire: int4}]", "train.global_batch=2"]
    keys += ["levels.stagger=false", f"train.kernels={kernels}", "model.mixer=attention"]
    (steps,) = world.run(1, launched_in_each_step, keys, 1, 2)
    packing = [{k: n for k, n in step.items() if "pack" in k} for step in steps]
    # A shard a level: each packed for the owners, and its sum for all; unpacked as often.
    once = {"pack_kernel": 2, "unpack_kernel": 2}
    both = {kernel: 2 * number for kernel, number in once.items()}
    assert packing == ([once, once, both] if kernels else [{}] * 3)


def bench(*arguments: str) -> tuple[Counter[str], int]:
    """The kernels that it launches, and how often it waits for the GPU to have done everything."""
    from nlscale.step import trainer as module

    module.check_kernels = lambda *args: None
    with gpu.stand_in(numbers=True), pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert not ended.value.code
    return gpu.launches, len(gpu.waits)


@pytest.mark.parametrize("what", ["step", "layer", "train"])
def test_benches_of_a_recipe_find_what_they_ask_a_gpu_for(what: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {dir: none}\n")
    batch = ["train.global_batch=2", "train.micro_batch=2"]
    sizes = [*SIZES[1:], *batch, "levels=[1]", "model.vocabulary=32"]
    times = ["--repeats" if what == "layer" else "--steps", "3"]
    ((launches, waits),) = world.run(1, bench, what, str(recipe), *sizes, *times)
    assert launches.keys() >= (HOPE.keys() if what == "layer" else {**HOPE, **LOSS}.keys())

    # Once for each row, not for each step, in which training does not wait either.
    assert what != "step" or waits == 1


def test_bench_scan_times_the_kernels_while_the_host_is_ahead() -> None:
    sizes = ["--sizes", "2x64x2x64", "--mixers", "hope", "attention"]
    ((launches, waits),) = world.run(1, bench, "scan", *sizes, "--repeats", "3")
    assert launches.keys() == HOPE.keys()
    # A matrix product and a copy; forward and backward of kernels, torch and attention.
    assert waits == 2 + 3 * 2

"""The loss of each source of a mixture, held to plain sums over the rows that are of it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import gpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from levels.level_runs import VOCABULARY, load

from nlscale.levels.spectrum import spectrum
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

LENGTH, ROWS, SOURCES = 16, 8, 4
SIZES = [f"data.sequence_length={LENGTH}", f"train.global_batch={ROWS}", "train.micro_batch=2"]
PLACES = np.array([0, 2, 2, 0, 0, 2, 3, 0])
"""Of each row: source 1 has none."""


def given() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the rows, and which of them count: nothing of source 3 does."""
    draw = np.random.default_rng(0)
    counts = draw.random((ROWS, LENGTH + 1)) < 0.6
    counts[PLACES == 3] = False
    return draw.integers(0, VOCABULARY, (ROWS, LENGTH + 1)), counts


def stepped(
    overrides: list[str], masked: bool, mixed: bool = True, spoil: bool = False
) -> dict[str, Any]:
    """A step of this rank of a world: what all ranks saw of it."""
    config, (rows, counts) = load([*SIZES, *overrides]), given()
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        batches = []
        for first in range(2 * layout.data_rank, ROWS, 2 * layout.data_size):
            part = slice(first, first + 2)
            of = (PLACES[part], SOURCES) if mixed else None
            mask = counts[part] if masked else None
            batches.append(trainer.to_batch(rows[part], 0, 2, mask, of))
        if spoil and layout.rank == 0:
            with torch.no_grad():
                next(trainer.stages[0].parameters()).fill_(math.nan)
        verdict, _ = trainer.take_step(batches)
        return {
            "loss": verdict.loss,
            "losses": verdict.source_losses,
            "counted": verdict.source_counted,
            "of": verdict.counted_tokens,
            "admitted": verdict.admitted,
        }


def plainly(masked: bool) -> tuple[list[float], list[int]]:
    """Means by source and the targets that they are over, of one process and whole logits."""
    config, (rows, counts) = load(SIZES), given()
    with process_groups(config):
        model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(model, config.run.seed, 0, 1)
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model.logits(model.hidden(tokens[:, :-1])[0]).transpose(0, 1)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double()
    means, numbers = [], []
    for source in range(SOURCES):
        sum_, number = 0.0, 0
        for row in np.flatnonzero(source == PLACES):
            for place in range(LENGTH):
                if not masked or counts[row, place + 1]:
                    sum_, number = sum_ + losses[row, place].item(), number + 1
        means.append(sum_ / number if number else math.nan)
        numbers.append(number)
    return means, numbers


LAYOUTS = {
    "one": (1, []),
    "data 2": (2, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2", "model.layers=2"]),
}


@pytest.mark.parametrize(("layout", "masked"), [("one", False), *((one, True) for one in LAYOUTS)])
def test_losses_by_source_are_plain_sums(layout: str, masked: bool) -> None:
    ranks, overrides = LAYOUTS[layout]
    sizes = [each for each in overrides if not each.startswith("parallel.")]
    results = world.run(ranks, stepped, overrides, masked)
    (expected,) = world.run(1, _with_sizes, sizes, masked)
    means, numbers = expected
    for result in results:
        assert result["counted"] == tuple(numbers) and numbers[1] == 0
        assert sum(numbers) == result["of"]
        assert result["losses"] == pytest.approx(means, rel=1e-5, nan_ok=True)
    assert (numbers[3] == 0) == masked


def _with_sizes(sizes: list[str], masked: bool) -> tuple[list[float], list[int]]:
    SIZES.extend(sizes)
    return plainly(masked)


def test_without_sources_a_step_is_the_same_to_the_bit() -> None:
    (mixed,), (plain,) = (world.run(1, stepped, [], True, way) for way in (True, False))
    assert mixed["loss"] == plain["loss"] and plain["losses"] == plain["counted"] == ()


def test_a_step_that_is_not_finite_has_no_loss_of_any_source() -> None:
    for result in world.run(2, stepped, [], False, True, True):
        assert not result["admitted"] and math.isnan(result["loss"])
        assert all(map(math.isnan, result["losses"]))
        assert sum(result["counted"]) == ROWS * LENGTH


def on_a_gpu() -> tuple[Counter[str], Counter[str]]:
    """Kernels of a step on what stands for a GPU, whose numbers nobody can ask for.

    Of one without sources and one with.
    """
    from nlscale.step import trainer as module

    module.check_kernels = lambda *args: None  # compares numbers
    sizes = ["train.dtype=bf16", "model.d_model=128", "model.heads=2", "model.memory.chunk=16"]
    sizes += ["data.sequence_length=16", "train.global_batch=2", "train.steps=2", "levels=[1]"]
    config, found = load(sizes), []
    with gpu.stand_in(), process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 32), VOCABULARY)
        for of in (None, (PLACES[:2], SOURCES)):
            gpu.launches.clear()
            batch = trainer.to_batch(given()[0][:2], 0, 2, None, of)
            assert batch.sources is None or batch.sources.rows.is_cuda
            trainer.take_step([batch])
            found.append(Counter(gpu.launches))
    return found[0], found[1]


def test_a_step_with_sources_stays_on_the_gpu() -> None:
    ((plain, mixed),) = world.run(1, on_a_gpu)
    assert plain == mixed and plain

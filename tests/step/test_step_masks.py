"""A target that does not count is no target: of the loss, of gradients, and of what divides them.

Every layout is held to a plain sum over the targets that count.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from checkpoint import resume_runs
from levels import level_runs
from levels.level_runs import VOCABULARY, largest_difference, load, run_engine, run_oracle

from nlscale.checkpoint.restore import _restore_progress
from nlscale.levels.engine import Progress
from nlscale.levels.spectrum import SyncGroup, spectrum
from nlscale.model import decoder as decoder_module
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch, LossMask, run_micro_batches
from nlscale.step.trainer import Trainer

LENGTH, ROWS = 24, 3
CPU = torch.device("cpu")


def double(overrides: tuple[str, ...] = ()) -> Decoder:
    """A model in float64, the same each time."""
    config = load(list(overrides))
    model = Decoder(config, megatron_config(config), VOCABULARY)
    initialize(model, 1, 0, 1)
    return model.double()


def micro_batches(masks: np.ndarray, seed: int = 0) -> list[Batch]:
    """Random tokens, one micro batch for each mask [rows, sequence]; the last row is no sample."""
    draw, out = np.random.default_rng(seed), []
    for mask in masks:
        rows = torch.from_numpy(draw.integers(0, VOCABULARY, (ROWS, LENGTH + 1)))
        counts = LossMask.of(mask, ROWS - 1, CPU)
        out.append(Batch(rows[:, :-1], rows[:, 1:], ROWS - 1, mask=counts))
    return out


def passed(batches: list[Batch]) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Sum of the losses and number of targets that count, and the gradients; by the trainer."""
    model = double()
    total, tokens, counted = run_micro_batches([model], batches, [])
    assert tokens == len(batches) * (ROWS - 1) * LENGTH
    return total.item(), counted, {n: p.grad for n, p in model.named_parameters()}


def plainly(batches: list[Batch], masks: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by logits and torch's cross entropy, of which the others are no part at all."""
    model, total = double(), torch.zeros((), dtype=torch.float64)
    for batch, mask in zip(batches, masks, strict=True):
        logits = model.logits(model.hidden(batch.tokens)[0]).transpose(0, 1)
        keep = torch.from_numpy(mask)
        keep[ROWS - 1 :] = False
        total = total + F.cross_entropy(logits[keep], batch.targets[keep], reduction="sum")
    total.backward()
    return total.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    """Of three micro batches: some count, none does, all do; [3, rows, sequence]."""
    masks = np.random.default_rng(1).integers(0, 3, (3, ROWS, LENGTH)) > 1
    masks[1], masks[2] = False, True
    return masks


@pytest.fixture(autouse=True, scope="module")
def groups() -> Any:
    with process_groups(load([])):
        yield


def test_loss_and_gradients_are_those_of_the_targets_that_count(masks: np.ndarray) -> None:
    batches = micro_batches(masks)
    assert [batch.mask is None for batch in batches] == [False, False, True]
    total, counted, gradients = passed(batches)
    expected, wanted = plainly(batches, masks)
    assert counted == masks[:, : ROWS - 1].sum()
    assert total == pytest.approx(expected, rel=1e-12)
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-9, atol=1e-11), name


def test_what_a_target_is_that_does_not_count_changes_nothing(
    masks: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where its loss is infinite."""
    batches = micro_batches(masks[:1])
    total, counted, gradients = passed(batches)
    targets, mask = batches[0].targets, batches[0].mask
    assert mask is not None
    others = torch.where(mask.counts, targets, (targets + 5) % VOCABULARY)
    entropy = decoder_module.cross_entropy

    def infinite(*args: Any) -> torch.Tensor:
        losses = entropy(*args)
        return losses + torch.where(mask.counts.T, 0.0, math.inf)

    monkeypatch.setattr(decoder_module, "cross_entropy", infinite)
    again = passed([batches[0]._replace(targets=others)])
    assert (total, counted) == again[:2]
    assert all(torch.equal(gradients[n], g) for n, g in again[2].items())


def test_where_no_target_counts_there_is_no_gradient(masks: np.ndarray) -> None:
    total, counted, gradients = passed(micro_batches(masks[1:2]))
    assert (total, counted) == (0.0, 0)
    assert not any(gradient.any() for gradient in gradients.values())


PLAIN = level_runs.sequences
NONE_COUNTS = 4
"""Step at which no target of any rank counts: in the middle of windows, or all of one."""


def masked_sequences(config: Any, step: int) -> list[Batch]:
    """Those of `level_runs`, of each of which fewer count than of the one before."""
    out = []
    for i, batch in enumerate(PLAIN(config, step)):
        draw = np.random.default_rng([step, i])
        counts = draw.random(batch.tokens.shape) < 1 - i / 3
        counts &= step != NONE_COUNTS
        out.append(batch._replace(mask=LossMask.of(counts, 1, CPU)))
    return out


def with_masks(run: Any, *args: Any) -> dict[str, Any]:
    """`run(*args)` on sequences with masks; importable, for a world."""
    level_runs.sequences = resume_runs.sequences = masked_sequences
    return run(*args)


SIZES = ["model.layers=4", "data.sequence_length=16", "levels=[1,2,4]", "train.steps=6"]
SIZES += ["train.global_batch=4", "optimizer.eps=1e-3"]
LAYOUTS = {
    "two nodes": (2, 1, []),
    "all at once, documents": (
        4,
        4,
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.pipeline=2",
            "parallel.virtual_stages=2",
            "data.document_mask=true",
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_plain_process(layout: str) -> None:
    ranks, per_node, overrides = LAYOUTS[layout]
    overrides = [*SIZES, *overrides]
    # some windows close there, with nothing but the step of which none counts
    spoil = {5: ranks - 1}
    results = world.run(ranks, with_masks, run_engine, overrides, spoil, ranks_per_node=per_node)
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (oracle,) = world.run(1, with_masks, run_oracle, alone, frozenset(spoil))
    assert results[0]["losses"] == pytest.approx(oracle["losses"], rel=1e-5, nan_ok=True)
    lost = [step for step, loss in enumerate(results[0]["losses"], 1) if math.isnan(loss)]
    dropped = [step for step, admitted in enumerate(results[0]["admitted"], 1) if not admitted]
    assert (lost, dropped) == ([NONE_COUNTS], [5])
    assert results[0]["counts"][0][0] == 4
    assert results[0]["fills"] == [0, 0, 0], "all windows are closed at the end"
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= 1e-6


def test_a_run_goes_on_bit_by_bit_from_a_window_with_masks(tmp_path: Path) -> None:
    args = ([*SIZES, "checkpoint.pending=exact"], tmp_path)
    (whole,) = world.run(1, with_masks, resume_runs.train, *args, (3,))
    for path in tmp_path.glob("*6*"):
        path.rename(tmp_path / "last")
    (resumed,) = world.run(1, with_masks, resume_runs.train, *args, (), True)
    assert list(resumed["losses"]) == [4, 5, 6]
    for name, p in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], p), name


def test_of_a_version_without_masks_every_token_of_a_window_counts() -> None:
    group = SyncGroup(1, 0, 4)
    progress = {group: Progress()}
    saved = {"level": 1, "phase": 0, "period": 4, "tokens": 96, "updates": 2, "reductions": 3}
    levels = load(["levels=[1,4]"]).levels
    optimizer = SimpleNamespace(progress=progress)
    trainer: Any = SimpleNamespace(optimizer=optimizer, levels=spectrum(levels, 32))
    config = {"levels": {"spectrum": [{"period": 1}, {"period": 4}]}}
    _restore_progress(trainer, {"levels": [saved], "config": config})
    assert progress[group] == Progress(tokens=96, counted_tokens=96, updates=2, reductions=3)


def launched(counts: np.ndarray) -> list[tuple[Counter[str], int]]:
    """Kernels of a step on what stands for a GPU, whose numbers nobody can ask for, and targets.

    Of one without masks and one with.
    """
    from nlscale.step import trainer as module

    module.check_kernels = lambda *args: None  # compares numbers
    sizes = ["train.dtype=bf16", "model.d_model=128", "model.heads=2", "model.memory.chunk=16"]
    sizes += ["data.sequence_length=32", "train.global_batch=1", "train.steps=2", "levels=[1]"]
    config, found = load(sizes), []
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (1, 33))
    with gpu.stand_in(), process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 32), VOCABULARY)
        for given in (None, counts):
            gpu.launches.clear()
            batch = trainer.to_batch(rows, 0, 1, given)
            assert batch.mask is None or batch.mask.counts.is_cuda
            trainer.take_step([batch])
            found.append((Counter(gpu.launches), batch.counted_tokens))
    return found


def test_a_step_with_masks_stays_on_the_gpu() -> None:
    counts = np.arange(33)[None] % 3 == 0
    (((plain, all_of_them), (masked, some)),) = world.run(1, launched, counts)
    assert masked == plain and plain
    assert (all_of_them, some) == (32, counts[:, 1:].sum())

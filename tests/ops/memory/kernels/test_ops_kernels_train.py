"""A model trained through the kernels, run by Triton's interpreter, and through torch."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from ops.interpreter import Call
from torch import Tensor

SHAPE = [
    "data.dir=none",
    "model.layers=1",
    "model.d_model=32",
    "model.heads=2",
    "model.hidden=32",
    "model.memory.chunk=16",
    "levels=[1,2]",
    "train.dtype=fp32",  # bf16 differs by more than a mistake might
    "train.global_batch=2",
    "train.micro_batch=2",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=2e-2",
    # weights whose gradient is nothing but rounding would make whole steps, or start at nothing
    "optimizer.eps=1e-5",
    "model.memory.eta_bias=-1",
]
VOCABULARY, STEPS = 32, 4
LENGTH, BEGINS = 48, 36
"""Three chunks, so that what Pi learns in the first makes what is written in the second, which the
third reads; in the second document the memory begins anew."""
SCAN = {"pi_kernel", "main_kernel", "writes_kernel", "reads_kernel"}
SCAN |= {name.replace("_kernel", "_backward_kernel") for name in {*SCAN, "inputs_kernel"}}
LOSS = {"statistics_kernel", "gradient_kernel"}


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    """At the end."""
    ran: set[str]
    """Names of the kernels that did."""


def trained(kernels: bool, seed: int, steps: int, *overrides: str) -> Trained:
    """A run with the kernels or without, in the process of the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    import nlscale.ops.memory.kernels.sizes
    from nlscale.config import recipe
    from nlscale.levels.spectrum import spectrum
    from nlscale.ops.documents import Documents
    from nlscale.ops.loss import cross_entropy
    from nlscale.parallel.layout import process_groups
    from nlscale.step.micro_batches import Batch
    from nlscale.step.trainer import Trainer

    asked, ran = [], set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        ran.add(self.__name__)
        return run(self, *args, **options)

    def supports(*given: Any) -> bool:
        asked.append(given)
        return kernels

    nlscale.ops.memory.kernels.sizes.supports = supports  # type: ignore[assignment]
    cross_entropy.supports = supports  # type: ignore[assignment]
    config = recipe.load(None, [*SHAPE, f"train.steps={steps}", *overrides]).config
    with mock.patch.object(InterpretedFunction, "run", noted), process_groups(config) as layout:
        levels = spectrum(config.levels, 2 * LENGTH)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        # Always the same rows: what it learns of them shows in a few steps.
        patterns = np.random.default_rng(seed).integers(VOCABULARY // 2, size=(2, 5))
        rows = np.stack([np.resize(pattern, LENGTH + 1) for pattern in patterns])
        documents = None
        if config.data.document_mask:
            rows[:, BEGINS] = VOCABULARY - 1
            documents = Documents.of(rows[:, :-1], VOCABULARY - 1, 16, layout.device)
        tokens = torch.from_numpy(rows)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], 2, documents)
        curve = [trainer.take_step([batch])[0].loss for _ in range(steps)]
    assert bool(asked) == config.train.kernels
    weights = {name: p.detach().clone() for name, p in trainer.named_parameters().items()}
    return Trained(curve, weights, ran)


@pytest.mark.parametrize(
    "overrides", [[], ["data.document_mask=true", "train.recompute=[mixer]"]], ids=str
)
def test_training_through_the_kernels_is_training(
    overrides: list[str], seed: int, interpreted: Call
) -> None:
    fused, plain = (
        interpreted(trained, kernels, seed, STEPS, *overrides) for kernels in (True, False)
    )
    assert fused.ran == SCAN | LOSS and not plain.ran
    assert plain.losses[-1] < plain.losses[0] - 1, f"too little to go wrong: {plain.losses}"
    assert np.abs(np.subtract(fused.losses, plain.losses)).max() < 3e-5
    for name, weight in plain.weights.items():
        error = (fused.weights[name] - weight).norm() / weight.norm()
        assert error < 5e-5, f"{name} is off by {error:.1e}"


def test_kernels_can_be_switched_off(interpreted: Call) -> None:
    off = interpreted(trained, True, 1, 1, "train.kernels=false")
    plain = interpreted(trained, False, 1, 1)
    assert off.losses == plain.losses and not off.ran

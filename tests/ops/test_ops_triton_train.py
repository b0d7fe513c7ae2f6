"""A model trained through the kernels, run by Triton's interpreter, and through torch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from ops.interpreter import Call

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
    "optimizer.learning_rate=1e-2",
]
VOCABULARY, LENGTH, STEPS = 32, 32, 6
SCAN = {"pi_kernel", "main_kernel", "writes_kernel", "reads_kernel"}
SCAN |= {name.replace("_kernel", "_backward_kernel") for name in {*SCAN, "inputs_kernel"}}
LOSS = {"statistics_kernel", "gradient_kernel"}


def trained(kernels: bool, seed: int, steps: int, *overrides: str) -> tuple[list[float], set[str]]:
    """In the process of the interpreter: a run, with the kernels or without.

    Returns:
        Its losses, and the names of the kernels that ran.
    """
    from triton.runtime.interpreter import InterpretedFunction

    import nlscale.ops.triton
    from nlscale import recipe
    from nlscale.levels import spectrum
    from nlscale.ops import cross_entropy
    from nlscale.ops.documents import Documents
    from nlscale.parallel.layout import process_groups
    from nlscale.parallel.schedule import Batch
    from nlscale.trainer import Trainer

    asked, ran = [], set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        ran.add(self.__name__)
        return run(self, *args, **options)

    def supports(*given: Any) -> bool:
        asked.append(given)
        return kernels

    nlscale.ops.triton.supports = supports  # type: ignore[assignment]
    cross_entropy.supports = supports  # type: ignore[assignment]
    config = recipe.load(None, [*SHAPE, f"train.steps={steps}", *overrides]).config
    draw = np.random.default_rng(seed)
    curve = []
    with mock.patch.object(InterpretedFunction, "run", noted), process_groups(config) as layout:
        levels = spectrum(config.levels, 2 * LENGTH)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        for _ in range(steps):
            patterns = draw.integers(VOCABULARY // 2, size=(2, 5))
            rows = np.stack([np.resize(pattern, LENGTH + 1) for pattern in patterns])
            documents = None
            if config.data.document_mask:
                rows[:, 20] = VOCABULARY - 1  # begins a document
                documents = Documents.of(rows[:, :-1], VOCABULARY - 1, 16, layout.device)
            tokens = torch.from_numpy(rows)
            batch = Batch(tokens[:, :-1], tokens[:, 1:], 2, documents)
            curve.append(trainer.take_step([batch])[0].loss)
    assert bool(asked) == config.train.kernels
    return curve, ran


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [[], ["data.document_mask=true", "train.recompute=[mixer]"]], ids=str
)
def test_training_through_the_kernels_is_training(
    overrides: list[str], seed: int, interpreted: Call
) -> None:
    (fused, ran), (plain, none) = (
        interpreted(trained, kernels, seed, STEPS, *overrides) for kernels in (True, False)
    )
    assert ran == SCAN | LOSS and not none
    assert np.abs(np.subtract(fused, plain)).max() < 1e-4, (fused, plain)
    assert np.ptp(plain) > 0.05, f"too little happened to go wrong: {plain}"


def test_kernels_can_be_switched_off(interpreted: Call) -> None:
    off, ran = interpreted(trained, True, 1, 1, "train.kernels=false")
    plain, _ = interpreted(trained, False, 1, 1)
    assert off == plain and not ran

"""AdamW on the host: the bias correction folded into arguments of an operation that has none."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ops.plain_ops import PlainCpuAdam

from nlscale.errors import UserError
from nlscale.ops import compiled
from nlscale.optim.cpu_adam import CpuAdam

STEPS, SIZE = 40, 1003  # ends where no register is full


@pytest.fixture(params=["plain", "compiled"])
def operation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        plain = PlainCpuAdam()
        monkeypatch.setattr(compiled, "load", lambda name: plain)
        return
    try:
        compiled.check("cpu_adam")
    except UserError:  # a minute, once a machine
        monkeypatch.setenv("PATH", os.environ["PATH"])
        compiled.build("cpu_adam", print)


def gradients(step: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(step))


def numbers(step: int) -> dict[str, object]:
    """Of a warm-up that begins at a rate of 0."""
    rate = 1e-2 * min(1.0, step / 10)
    return {"lr": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def steps_on_the_host(stops: int | None) -> list[torch.Tensor]:
    """Weights and moments after all steps; at one of them the process is another."""
    weights = torch.randn(SIZE, generator=torch.Generator().manual_seed(99))
    kept = {name: torch.zeros(SIZE) for name in ("exp_avg", "exp_avg_sq")}
    own = CpuAdam()
    for step in range(STEPS):
        if step == stops:
            own = CpuAdam()
        own.update(numbers(step), step + 1, weights, gradients(step), kept)
    return [weights, *kept.values()]


def test_it_is_adamw_within_a_millionth_and_resumes_bitwise(operation: None) -> None:
    theta = torch.randn(SIZE, generator=torch.Generator().manual_seed(99)).double().numpy()
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    for step in range(STEPS):
        g, own = gradients(step).double().numpy(), numbers(step)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        theta = theta * (1 - own["lr"] * 0.1)
        theta -= own["lr"] * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    weights, *moments = steps_on_the_host(None)
    for found, meant in zip((weights, *moments), (theta, m, v), strict=True):
        np.testing.assert_allclose(found.numpy(), meant, rtol=2e-6, atol=1e-6)
    for one, other in zip(steps_on_the_host(17), (weights, *moments), strict=True):
        assert torch.equal(one, other)

"""What stands in for DeepSpeed's compiled operations in tests: their arithmetic, in numpy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from torch import Tensor

from nlscale.ops import compiled


class PlainCpuAdam:
    """`cpu_adam`: an update in fp32 with a bias correction of its own, as
    csrc/adam/cpu_adam_impl.cpp has it."""

    def __init__(self) -> None:
        self.mode: dict[int, bool] = {}

    def create_adam(self, number: int, *numbers: Any) -> None:
        self.mode[number] = numbers[-2]

    def destroy_adam(self, number: int) -> None:
        del self.mode[number]

    def adam_update(
        self, number: int, step: int, lr: float, beta1: float, beta2: float, eps: float,
        decay: float, corrects: bool, weights: Tensor, gradient: Tensor, m: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        assert self.mode[number] and step == 1 and not corrects
        w, g, m_, v_ = (t.numpy() for t in (weights, gradient, m, v))
        f = np.float32
        m_[:] = m_ * f(beta1) + g * (f(1) - f(beta1))
        v_[:] = v_ * f(beta2) + g * g * (f(1) - f(beta2))
        if decay:
            w += w * (f(-lr) * f(decay))
        w += f(-lr) * (m_ / (np.sqrt(v_) + f(eps)))


def stand_in() -> None:
    """From now on operations in this process are these."""
    made = {"cpu_adam": PlainCpuAdam()}
    compiled.load = made.__getitem__  # type: ignore[assignment]
    sys.modules["nlscale.ops.compiled"].check = lambda name: {}  # type: ignore[attr-defined]

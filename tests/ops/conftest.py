"""Fixtures of the tests of the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from ops.interpreter import Call, interpreter


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")  # shown when the test fails
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Call]:
    """`interpreted(function, *arguments)` runs it where Triton's kernels run on CPU tensors."""
    pytest.importorskip("triton", reason="no Triton on this system")
    with interpreter() as call:
        yield call

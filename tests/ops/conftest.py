"""Fixtures of the tests of the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec

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
    assert find_spec("triton"), (
        "triton not found: pip install triton (Linux; it is in nlscale[dev])"
    )
    with interpreter() as call:
        yield call

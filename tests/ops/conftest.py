"""Fixtures of the tests of the operations."""

from __future__ import annotations

import random

import pytest
import torch


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")  # shown when the test fails
    torch.manual_seed(seed)
    return seed

"""Makes `tests/` importable, and gives what tests of several rooms share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ops.interpreter import Call, interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Call]:
    """`interpreted(function, *arguments)` runs it where Triton's kernels run on CPU tensors."""
    assert find_spec("triton"), (
        "triton not found: pip install triton (Linux; it is in nlscale[dev])"
    )
    with interpreter() as call:
        yield call

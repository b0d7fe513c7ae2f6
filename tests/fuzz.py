"""How many examples the tests with random inputs try."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

VARIABLE = "NLSCALE_FUZZ_EXAMPLES"


def examples(count: int) -> Any:
    """A decorator of a hypothesis test: it tries `count` examples, or what the variable says.

    With the variable they are other ones each time; without it the same each time, so that
    nothing fails that did not fail before.
    """
    asked = os.environ.get(VARIABLE)
    return settings(
        max_examples=int(asked) if asked else count,
        derandomize=not asked,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

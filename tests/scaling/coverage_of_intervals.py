"""How often right intervals hold the truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from scipy.stats import binom


def about_ninety(quantities: int) -> range:
    """Of 100 right intervals of 90 %, how many hold the truth, but for chance.

    Were each of so many intervals right, one of them would be outside this in one test run of 500.
    """
    fewest, most = binom.ppf([0.001 / quantities, 1 - 0.001 / quantities], 100, 0.9)
    return range(int(fewest), int(most) + 1)


@contextmanager
def few_starts() -> Iterator[None]:
    """Fits begin at 4 x 4 exponents, not 12 x 12: of a grid with little noise any of them finds the
    optimum, and a hundred fits are made of such grids."""
    with mock.patch("nlscale.scaling.law.fit._GRID", np.geomspace(0.05, 2.0, 4)):
        yield

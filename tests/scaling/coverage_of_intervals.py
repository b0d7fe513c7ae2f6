"""How often right intervals hold the truth."""

from __future__ import annotations

from scipy.stats import binom


def about_ninety(quantities: int) -> range:
    """Of 100 right intervals of 90 %, how many hold the truth, but for chance.

    Were each of so many intervals right, one of them would be outside this in one test run of 500.
    """
    fewest, most = binom.ppf([0.001 / quantities, 1 - 0.001 / quantities], 100, 0.9)
    return range(int(fewest), int(most) + 1)

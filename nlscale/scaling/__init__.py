"""Scaling laws: from measured losses to a law, its uncertainty and what a budget buys.

No torch is imported.
"""

from nlscale.scaling.law.fit import Fit, fit
from nlscale.scaling.law.law import Law
from nlscale.scaling.law.points import Points

__all__ = ["Fit", "Law", "Points", "fit"]

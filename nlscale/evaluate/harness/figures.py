"""The figures of a task from what each document gave, with standard errors and intervals.

Of a mean the standard error is that of independent documents. Of what is computed from sums over
documents, such as perplexity, it is that of the logarithm to first order (the delta method). Of
anything else, such as BLEU, it is that over documents drawn again with replacement. Intervals hold
95%: Wilson's of a share of documents, else Student's, of a perplexity on the logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from nlscale.evaluate.intervals import Share

_Z = 1.959963984540054
_DRAWS = 200
"""Of documents, for the standard error of what has no formula."""

Aggregation = Callable[[Sequence[Any]], float]


class Figure(NamedTuple):
    """Of one metric."""

    value: float
    stderr: float | None
    """None: of a single document."""
    interval: tuple[float, float] | None


def figure(aggregation: Aggregation, items: Sequence[Any]) -> Figure | None:
    """A metric over documents; None: it is no number.

    Args:
        aggregation: of the harness, from the items to the value.
        items: what each document gave.
    """
    value = aggregation(items)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    if len(items) < 2:
        return Figure(float(value), None, None)
    spread = _SPREADS.get(getattr(aggregation, "__name__", ""), _drawn)
    return spread(float(value), aggregation, items)


def called(figure: Mapping[str, Any]) -> str:
    """The metric of a figure, and the filter that answers went through, where there is one."""
    filtered = figure["filter"]
    return figure["metric"] if filtered == "none" else f"{figure['metric']} ({filtered})"


def normal(value: float, stderr: float) -> tuple[float, float]:
    """The 95% interval of what is normal, whose standard error is known well."""
    return value - _Z * stderr, value + _Z * stderr


def _mean(value: float, aggregation: Aggregation, items: Sequence[Any]) -> Figure:
    values = np.array(items, dtype=np.float64)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values)))
    if np.isin(values, (0.0, 1.0)).all():
        return Figure(value, stderr, Share(int(values.sum()), len(values)).interval)
    return _symmetric(value, stderr, len(items))


def _perplexity(value: float, aggregation: Aggregation, items: Sequence[Any]) -> Figure:
    return _of_logarithm(value, np.array(items, dtype=np.float64), np.ones(len(items)))


def _weighted_perplexity(value: float, aggregation: Aggregation, items: Sequence[Any]) -> Figure:
    return _of_logarithm(value, *_sums(items))


def _bits_per_byte(value: float, aggregation: Aggregation, items: Sequence[Any]) -> Figure:
    return _symmetric(value, _of_ratio(*_sums(items)) / math.log(2), len(items))


def _drawn(value: float, aggregation: Aggregation, items: Sequence[Any]) -> Figure:
    generator = np.random.default_rng(0)
    numbers = generator.integers(len(items), size=(_DRAWS, len(items)))
    values = [float(aggregation([items[i] for i in draw])) for draw in numbers.tolist()]
    return _symmetric(value, float(np.std(values, ddof=1)), len(items))


_SPREADS: dict[str, Callable[[float, Aggregation, Sequence[Any]], Figure]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits_per_byte,
}
"""By what the harness calls its aggregations."""


def _symmetric(value: float, stderr: float, documents: int) -> Figure:
    half = _student(documents) * stderr
    return Figure(value, stderr, (value - half, value + half))


def _of_logarithm(value: float, sums: NDArray[Any], weights: NDArray[Any]) -> Figure:
    """Of exp(-sum of sums / sum of weights)."""
    stderr = _of_ratio(sums, weights)
    half = _student(len(sums)) * stderr
    return Figure(value, value * stderr, (value * math.exp(-half), value * math.exp(half)))


def _of_ratio(sums: NDArray[Any], weights: NDArray[Any]) -> float:
    """Standard error of sum(sums) / sum(weights) over independent documents, to first order."""
    n, ratio = len(sums), sums.sum() / weights.sum()
    rest = sums - ratio * weights
    return float(math.sqrt(n / (n - 1) * (rest**2).sum()) / weights.sum())


def _sums(items: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    pairs = np.array(items, dtype=np.float64)
    return pairs[:, 0], pairs[:, 1]


def _student(documents: int) -> float:
    return float(t.ppf(0.975, documents - 1))

"""The matrix of results of a stream, and what is read off it (Lopez-Paz & Ranzato 2017).

R[i][j] is the score on task j after task i, b_j before any. Forgetting and transfer are positive
where the words say so: more forgotten, more gained, whether a higher score is better or a lower.
No torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nlscale.evaluate.intervals import Ratio


@dataclass(frozen=True)
class Matrix:
    """Of one run; two tasks or more."""

    before: Sequence[float]
    """b_j."""
    rows: Sequence[Sequence[float]]
    """R: a row for each task that has been learned, of all tasks."""
    higher: bool
    """Whether a higher score is better."""

    @property
    def _gain(self) -> float:
        """Of a score that has risen by 1."""
        return 1.0 if self.higher else -1.0

    @property
    def _tasks(self) -> range:
        return range(len(self.rows))

    def average(self) -> float:
        """mean_j R[T][j]: the scores of all tasks at the end."""
        return fmean(self.rows[-1])

    def learned(self) -> float:
        """mean_j R[j][j]: the score of each task right after it."""
        return fmean(self.rows[j][j] for j in self._tasks)

    def forgetting(self) -> float:
        """mean_{j<T} (max_{i<T} R[i][j] - R[T][j]), of losses with the sign turned: what the best
        score of an earlier task has over that at the end."""
        best = max if self.higher else min
        last, earlier = self.rows[-1], self.rows[:-1]
        return self._gain * fmean(
            best(row[j] for row in earlier) - last[j] for j in self._tasks[:-1]
        )

    def backward(self) -> float:
        """BWT = mean_{j<T} (R[T][j] - R[j][j]), of losses with the sign turned: what later tasks
        have brought to earlier ones, below 0 where they have cost them."""
        return self._gain * fmean(self.rows[-1][j] - self.rows[j][j] for j in self._tasks[:-1])

    def forward(self) -> float:
        """FWT = mean_{j>1} (R[j-1][j] - b_j), of losses with the sign turned: what earlier tasks
        have brought to those that come."""
        return self._gain * fmean(self.rows[j - 1][j] - self.before[j] for j in self._tasks[1:])

    def figures(self) -> dict[str, float]:
        """All of them, by name."""
        return {name: float(getattr(self, name)()) for name in FIGURES}


FIGURES = {
    "average": "average at the end",
    "learned": "average when learned",
    "forgetting": "forgetting",
    "backward": "backward transfer",
    "forward": "forward transfer",
}
"""What each is called."""


def over_seeds(values: Sequence[float]) -> dict[str, object]:
    """Their mean with the 95% interval of Student, None of a single one; as JSON holds it."""
    found = Ratio.of(values, [1.0] * len(values))
    assert found is not None, "there is a seed"
    interval = None if found.interval is None else list(found.interval)
    return {"mean": found.value, "interval": interval, "seeds": len(values)}


def differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[float]:
    """Of what two methods have with the same seeds, ours less theirs."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

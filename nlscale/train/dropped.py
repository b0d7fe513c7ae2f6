"""When a run gives up because of steps that were dropped, and what it says then."""

from __future__ import annotations

import statistics
from collections import Counter

from nlscale.config.curriculum import curriculum, stage_of
from nlscale.config.vocabulary import Config, mixer_label
from nlscale.errors import TrainingFailed
from nlscale.parallel.consensus import SPIKE, Verdict

_HAS_RISEN = 1.5
"""Times the median of the steps before: losses below it have hardly moved."""


class Drops:
    """The steps that were dropped one after another, of this start.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._stages = config, curriculum(config)
        self._row: list[Verdict] = []

    def see(self, verdict: Verdict, step: int, in_a_row: int) -> None:
        """Note what became of a step.

        Args:
            verdict: of it.
            step: its number.
            in_a_row: steps dropped in a row by now, those before this start included.

        Raises:
            TrainingFailed: too many were; or the step was taken with other tokens than planned.
        """
        if verdict.admitted:
            self._row.clear()
            self._check_tokens(verdict, step)
            return
        self._row.append(verdict)
        if in_a_row >= self._config.train.max_dropped_steps:
            raise TrainingFailed(
                f"{in_a_row} steps in a row were dropped, the last of them step {step}: "
                f"{self._reasons(in_a_row)}. {self._advice()}"
            )

    def _check_tokens(self, verdict: Verdict, step: int) -> None:
        stage = stage_of(self._stages, step)
        if verdict.tokens == stage.tokens_per_step:
            return
        raise TrainingFailed(
            f"step {step} was taken with {verdict.tokens:,} tokens instead of the "
            f"{stage.tokens_per_step:,} that train.global_batch {stage.global_batch} x "
            f"data.sequence_length {stage.sequence_length} make: the ranks did not read the whole "
            f"batch; compare the number of ranks that were started with WORLD_SIZE"
        )

    def _reasons(self, in_a_row: int) -> str:
        """How often which; losses that were finite are given, so that nobody takes them for lost.

        What was dropped before this start is not known any more.
        """
        kinds = Counter((v.dropped_because or "").partition(":")[0] for v in self._row)
        said = [f"{kind} ({count})" for kind, count in kinds.items()]
        if in_a_row > len(self._row):
            said.append(f"before this start ({in_a_row - len(self._row)})")
        finite = [v.loss for v in self._row if not v.losses_not_finite]
        if finite:
            said.append(f"with finite losses of {min(finite):.4g} to {max(finite):.4g}")
        if kinds[SPIKE]:
            limits = [v.limit for v in self._row if v.loss > v.limit]
            said.append(f"above the limit of {limits[-1]:.4g}")
        return ", ".join(said)

    def _advice(self) -> str:
        rate = self._config.optimizer.learning_rate
        lower = f"ower optimizer.learning_rate ({rate:g})"
        spikes = [v for v in self._row if (v.dropped_because or "").startswith(SPIKE)]
        times = self._config.train.drop_spikes
        if len(spikes) < len(self._row) or times is None:
            mixer = mixer_label(self._config.model)
            return f"{mixer} diverged: l{lower}"
        risen = statistics.median(v.loss / (v.limit / times) for v in spikes)
        if risen < _HAS_RISEN:
            return (
                f"The losses are only {risen:.3g} times the median of the steps before: "
                f"train.drop_spikes={times:g} is too low; raise it, or null drops none"
            )
        return (
            f"The losses are {risen:.3g} times the median of the steps before, and "
            f"train.drop_spikes is {times:g}: l{lower}, or raise train.drop_spikes if this is meant"
        )

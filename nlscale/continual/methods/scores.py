"""The hook that scores every task of a stream, learned or not: a row of R at each boundary."""

from __future__ import annotations

import time
from typing import Any

from nlscale.continual.methods.options import ScoresOptions, TaskOptions
from nlscale.continual.metrics import METRICS, RECORD
from nlscale.data import Samples
from nlscale.errors import UserError
from nlscale.evaluate.table import evaluation
from nlscale.train.hooks.hook import Hook
from nlscale.train.mixed import mean


class Scores(Hook):
    """Records TASK/METRIC of each task before the first step, and whenever it is called.

    A score is of the first `train.validation_sequences` held-out sequences of each source of a
    task, weighted.
    """

    Options = ScoresOptions

    def begin(self) -> None:
        folders = {str(one.train.directory): one.held_out for one in self.run.prepared.folders}
        config = self.run.config
        self._splits: dict[str, list[tuple[Samples, float]]] = {}
        for task in self.options.tasks:
            self._splits[task.name] = []
            for source in task.sources:
                if source.dir not in folders:
                    raise UserError(
                        f"hooks: {self.given.name}: {source.dir} of {task.name} is in no mixture "
                        f"of the run, which has {', '.join(folders)}"
                    )
                split = Samples(folders[source.dir], config.data.sequence_length)
                self._splits[task.name].append((split, source.weight))
        if self.run.step == 0:
            self.on_update()

    def on_update(self) -> None:
        """Score all tasks, and record it."""
        started = time.monotonic()
        figures = {
            f"{task.name}/{self.options.metric}": self._score(task) for task in self.options.tasks
        }
        self.run.record(RECORD, figures, time.monotonic() - started)

    def _score(self, task: TaskOptions) -> float:
        metric = METRICS[self.options.metric]
        asked = evaluation(metric.evaluation)
        found: list[Any] = []
        for split, _ in self._splits[task.name]:
            value = asked.run(self.run.trainer, split)[metric.figure]
            if value is None:
                raise UserError(
                    f"{split.shards.directory} of {task.name} has no {self.options.metric}: no "
                    f"held-out target of it counts, or they stand for no text; metric: loss has "
                    f"one where targets count"
                )
            found.append(value)
        score = mean(found, [weight for _, weight in self._splits[task.name]])
        assert score is not None, "weights are above 0"
        return score

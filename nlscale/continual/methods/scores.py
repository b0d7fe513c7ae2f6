"""The hook that scores every task of a stream, learned or not: a row of R at each boundary."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlscale.continual.labels import Example, accuracy, examples_of, labels_of
from nlscale.continual.methods.learning import learned_nats, levels_that_learn
from nlscale.continual.methods.options import ScoresOptions, TaskOptions
from nlscale.continual.metrics import METRICS, RECORD
from nlscale.data import Samples
from nlscale.errors import UserError
from nlscale.evaluate.loss import loss
from nlscale.evaluate.rows import row_nats
from nlscale.train.hooks.hook import Hook
from nlscale.train.mixed import mean


class Scores(Hook):
    """Records TASK/METRIC of each task before the first step, and whenever it is called.

    A score is of the first `train.validation_sequences` held-out sequences of each source of a
    task, or of as many labelled documents, weighted. Where levels have a context of objective
    `ntp`, they learn from each sequence while it is scored (`nlscale.continual.methods.learning`).
    """

    Options = ScoresOptions

    def begin(self) -> None:
        folders = {str(one.train.directory): one.held_out for one in self.run.prepared.folders}
        config = self.run.config
        self._metric = METRICS[self.options.metric]
        self._levels = levels_that_learn(self.run.trainer)
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
        if self._metric.labelled:
            self._examples: dict[str, list[Example]] = {
                str(split.shards.directory): examples_of(split)
                for splits in self._splits.values()
                for split, _ in splits
            }
            self._labels = labels_of([one for own in self._examples.values() for one in own])
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
        ask = self._accuracy if self._metric.labelled else self._loss
        found: list[Any] = []
        for split, _ in self._splits[task.name]:
            value = ask(split)
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

    def _loss(self, split: Samples) -> float | None:
        """Of the loss, the figure that is asked for; None: there is none."""
        if not self._levels:
            return loss(self.run.trainer, split)[self.options.metric]
        held = split.first(self.run.config.train.validation_sequences)
        rows = np.stack([held[i] for i in range(len(held))])
        masks = [held.mask(i) for i in range(len(held))]
        counts = np.stack([np.ones(len(rows[0]), bool) if m is None else m for m in masks])
        counted, size = int(counts[:, 1:].sum()), split.shards.bytes_per_token
        if not counted:
            return None
        nats = float(self._nats(split, rows, counts).sum()) / counted
        figures = {"loss": nats, "bits_per_byte": nats / math.log(2) / size if size else None}
        return figures[self.options.metric]

    def _accuracy(self, split: Samples) -> float:
        most = self.run.config.train.validation_sequences
        examples = self._examples[str(split.shards.directory)][:most]
        return accuracy(
            examples,
            self._labels,
            split.sequence_length,
            split.shards.separator,
            lambda rows, counts: self._nats(split, rows, counts),
        )

    def _nats(
        self, split: Samples, rows: NDArray[np.int64], counts: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        if self._levels:
            return learned_nats(self.run.trainer, self._levels, rows, counts)
        return row_nats(self.run.trainer, rows, counts, split.shards.separator)

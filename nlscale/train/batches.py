"""Which samples a rank reads for a training step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain

from nlscale.config.curriculum import TrainingStage, stage_of
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer
from nlscale.train.prepare import Prepared

STEPS_EXPECTED = 8
"""Steps whose shards are fetched ahead where they lie on another service."""


class StepReader:
    """This rank's micro batches, step by step; those of the next are read while one is taken.

    Sample numbers are global: which rank reads a sample changes with the layout, which samples a
    step reads does not. What is read ahead follows from where the run stands, and is no state.
    """

    def __init__(self, trainer: Trainer, prepared: Prepared) -> None:
        self._trainer, self._prepared = trainer, prepared
        self._ahead: Future[list[Batch]] | None = None

    def take(self) -> list[Batch]:
        """Of the step that is about to be taken; what kept them from being read is raised here."""
        counters, train = self._trainer.counters, self._trainer.config.train
        step, first = counters.step + 1, counters.samples
        batches = self._ahead.result() if self._ahead is not None else self._read(step, first)
        self._ahead = None
        if step < train.steps:
            following = first + stage_of(self._prepared.stages, step).global_batch
            self._ahead = _in_background(partial(self._read, step + 1, following))
            self._expect(step + 1, following)
        return batches

    def _expect(self, step: int, sample: int) -> None:
        """Say what this rank will read of a step and those after it, as far as the cut goes."""
        stages, steps = self._prepared.stages, self._trainer.config.train.steps
        cut, numbers = stage_of(stages, step).cut, []
        for later in range(step, min(step + STEPS_EXPECTED, steps + 1)):
            stage = stage_of(stages, later)
            if stage.cut == cut:
                numbers.append(self._numbers(stage, sample))
            sample += stage.global_batch
        self._prepared.readers[cut].expect(chain.from_iterable(numbers))

    def _numbers(self, stage: TrainingStage, sample: int) -> Iterator[tuple[int, int]]:
        """What this rank reads of a step of a stage, whose first sample has that global number.

        In the numbers of the stage's cut: (first, count), by micro batch.
        """
        layout, size = self._trainer.layout, self._trainer.config.train.micro_batch
        first = stage.number_in_cut(sample)
        for i in range(stage.global_batch // (size * layout.data_size)):
            yield first + (i * layout.data_size + layout.data_rank) * size, size

    def _read(self, step: int, sample: int) -> list[Batch]:
        """Those of a step, counted from 1, whose first sample has that global number."""
        stage, batches = stage_of(self._prepared.stages, step), []
        reader = self._prepared.readers[stage.cut]
        for number, size in self._numbers(stage, sample):
            rows, counts = reader.read(number, size), reader.masks(number, size)
            of = reader.sources(number, size)
            batches.append(self._trainer.to_batch(rows, reader.separator, size, counts, of))
        return batches


def _in_background(work: Callable[[], list[Batch]]) -> Future[list[Batch]]:
    """In a thread that does not keep the process from ending, as those of a pool would."""
    future: Future[list[Batch]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

"""Which samples a rank reads for a training step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from nlscale.config.curriculum import TrainingStage, stage_of
from nlscale.data import BatchReader
from nlscale.data.reader import MixtureReader
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer
from nlscale.train.prepare import Prepared
from nlscale.train.replay import Replay

STEPS_EXPECTED = 8
"""Steps whose shards are fetched ahead where they lie on another service."""


class StepReader:
    """This rank's micro batches, step by step; those of the next are read while one is taken.

    Sample numbers are global: which rank reads a sample changes with the layout, which samples a
    step reads does not. What is read ahead follows from where the run stands, and is no state.
    """

    def __init__(self, trainer: Trainer, prepared: Prepared, replay: Replay | None = None) -> None:
        self._trainer, self._prepared = trainer, prepared
        self._replay = replay or Replay({}, seed=0)
        self._version = self._replay.version
        self._ahead: Future[list[Batch]] | None = None

    def take(self) -> list[Batch]:
        """Of the step that is about to be taken; what kept them from being read is raised here."""
        counters, train = self._trainer.counters, self._trainer.config.train
        step, first = counters.step + 1, counters.samples
        batches = self._ahead.result() if self._ahead is not None else None
        if batches is None or self._version != self._replay.version:
            batches = self._read(step, first)
        self._ahead, self._version = None, self._replay.version
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
            numbers = self._replay.instead_of(range(number, number + size))
            batches.append(self._trainer.to_batch(*read(reader, numbers)))
        return batches


def read(
    reader: BatchReader | MixtureReader, numbers: Sequence[int]
) -> tuple[Any, int, int, Any, Any]:
    """What `Trainer.to_batch` takes, of samples by their numbers in the reader's cut."""
    if isinstance(numbers, range) and numbers.step == 1:
        parts = [(numbers.start, len(numbers))]
    else:
        parts = [(number, 1) for number in numbers]
    rows = np.concatenate([reader.read(*part) for part in parts])
    masks = [mask for part in parts if (mask := reader.masks(*part)) is not None]
    sources = [of for part in parts if (of := reader.sources(*part)) is not None]
    counts = np.concatenate(masks) if masks else None
    of = (np.concatenate([each for each, _ in sources]), sources[0][1]) if sources else None
    return rows, reader.separator, len(numbers), counts, of


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

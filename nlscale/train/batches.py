"""Which samples a rank reads for a training step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain

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
        first = counters.samples
        batches = self._ahead.result() if self._ahead is not None else self._read(first)
        self._ahead = None
        if counters.step + 1 < train.steps:
            self._ahead = _in_background(partial(self._read, first + train.global_batch))
            left = min(STEPS_EXPECTED, train.steps - counters.step - 1)
            firsts = [first + (number + 1) * train.global_batch for number in range(left)]
            self._prepared.reader.expect(chain.from_iterable(map(self._numbers, firsts)))
        return batches

    def _numbers(self, first: int) -> Iterator[tuple[int, int]]:
        """What this rank reads of the step that begins with a sample: (first, count), by batch."""
        layout, size = self._trainer.layout, self._trainer.config.train.micro_batch
        for i in range(self._prepared.micro_batches):
            yield first + (i * layout.data_size + layout.data_rank) * size, size

    def _read(self, first: int) -> list[Batch]:
        reader, batches = self._prepared.reader, []
        for number, size in self._numbers(first):
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

"""Which samples a rank reads, for a training step and for validation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from nlscale.checks import Prepared
from nlscale.data import Samples
from nlscale.ops.documents import Documents
from nlscale.ops.transfer import to_device
from nlscale.parallel.consensus import Verdict, agree
from nlscale.parallel.schedule import Batch, run_micro_batches
from nlscale.trainer import Trainer


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
        return batches

    def _read(self, first: int) -> list[Batch]:
        layout, size = self._trainer.layout, self._trainer.config.train.micro_batch
        reader, batches = self._prepared.reader, []
        for i in range(self._prepared.micro_batches):
            offset = (i * layout.data_size + layout.data_rank) * size
            rows = reader.read(first + offset, size)
            batches.append(_to_batch(rows, reader.samples, self._trainer, size))
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


def validation_loss(trainer: Trainer, samples: Samples) -> Verdict:
    """Loss over the first held-out sequences, shared out over the data-parallel ranks.

    Every rank passes as many micro batches of one size as the schedule wants; rows beyond its
    share are read again to fill them and are not counted.
    """
    config, layout = trainer.config, trainer.layout
    size, group = config.train.micro_batch, config.parallel.pipeline
    count = min(config.train.validation_sequences, len(samples))
    mine = range(layout.data_rank, count, layout.data_size)
    batches = []
    for i in range(-(-count // (size * layout.data_size * group)) * group):
        numbers = mine[i * size : (i + 1) * size]
        filled = [*numbers, *[0] * (size - len(numbers))]
        rows = np.stack([samples[n] for n in filled])
        batches.append(_to_batch(rows, samples, trainer, len(numbers)))
    loss_sum, seen = run_micro_batches(trainer.stages, batches, None)
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    return agree(layout, loss_sum, seen, no_gradient).read()


def _to_batch(rows: NDArray[np.int64], samples: Samples, trainer: Trainer, counted: int) -> Batch:
    """Of these samples; the last token of each is only a target."""
    config, device, documents = trainer.config, trainer.layout.device, None
    if config.data.document_mask:
        separator, chunk = samples.shards.separator, config.model.memory.chunk
        documents = Documents.of(rows[:, :-1], separator, chunk, device)
    tokens = to_device(rows, device)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, documents)

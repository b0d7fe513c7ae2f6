"""Which samples a rank reads, for a training step and for validation."""

from __future__ import annotations

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


def read_step(trainer: Trainer, prepared: Prepared) -> list[Batch]:
    """This rank's micro batches of the next step.

    Sample numbers are global: which rank reads a sample changes with the layout, which samples a
    step reads does not.
    """
    layout, size = trainer.layout, trainer.config.train.micro_batch
    first = trainer.counters.samples
    batches = []
    for i in range(prepared.micro_batches):
        offset = (i * layout.data_size + layout.data_rank) * size
        rows = prepared.reader.read(first + offset, size)
        batches.append(_to_batch(rows, prepared.reader.samples, trainer, size))
    return batches


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

"""The losses of single training samples, while a run trains."""

from __future__ import annotations

import numpy as np
import torch

from nlscale.parallel.consensus import agree
from nlscale.step.micro_batches import RowSources, run_micro_batches, sums_by_source
from nlscale.step.trainer import Trainer
from nlscale.train.batches import read
from nlscale.train.prepare import Prepared


def losses_of(trainer: Trainer, prepared: Prepared, numbers: list[int]) -> dict[int, float]:
    """The mean loss of each, nats a target that counts; one without such is left out.

    Collective: the data-parallel ranks share them out. Each is summed up as if it were a source of
    its own; those that only fill a micro batch are read twice, which leaves their mean as it is.

    Args:
        trainer: whose model is asked.
        prepared: what reads the samples, all of one length.
        numbers: of samples, each once.
    """
    if not numbers:
        return {}
    layout, reader = trainer.layout, prepared.readers[0]
    size, group = trainer.config.train.micro_batch, trainer.config.parallel.pipeline
    count = -(-len(numbers) // (size * layout.data_size * group)) * group
    mine = [*range(layout.data_rank, len(numbers), layout.data_size)]
    mine += [0] * (count * size - len(mine))
    batches = []
    for i in range(count):
        places = mine[i * size : (i + 1) * size]
        rows, separator, counted, counts, _ = read(reader, [numbers[place] for place in places])
        batch = trainer.to_batch(rows, separator, counted, counts)
        targets = None if counts is None else counts[:, 1:]
        sources = RowSources.of(
            np.array(places), len(numbers), targets, rows.shape[1] - 1, layout.device
        )
        batches.append(batch._replace(sources=sources))
    by_sample = sums_by_source(batches)
    seen = run_micro_batches(trainer.stages, batches, None, by_sample)
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    verdict = agree(layout, *seen, no_gradient, by_source=by_sample).read()
    found = zip(numbers, verdict.source_losses, verdict.source_counted, strict=True)
    return {number: loss for number, loss, counted in found if counted}

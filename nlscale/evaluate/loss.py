"""The loss on held-out data."""

from __future__ import annotations

import math

import numpy as np
import torch

from nlscale.data import Samples
from nlscale.model.decoder import Decoder
from nlscale.parallel.consensus import Verdict, agree
from nlscale.step.micro_batches import Batch, run_micro_batches
from nlscale.step.trainer import Trainer


def loss(trainer: Trainer, samples: Samples) -> dict[str, float | None]:
    """`loss`, nats a token that counts, and `bits_per_byte` of the text that these stand for.

    The first is None where none counts, the second also where they stand for no text.
    """
    verdict, size = validation_loss(trainer, samples), samples.shards.bytes_per_token
    if not verdict.counted_tokens:
        return {"loss": None, "bits_per_byte": None}
    bits = verdict.loss / math.log(2) / size if size else None
    return {"loss": verdict.loss, "bits_per_byte": bits}


def validation_loss(
    trainer: Trainer, samples: Samples, stages: list[Decoder] | None = None
) -> Verdict:
    """Loss over the first held-out sequences, shared out over the data-parallel ranks.

    `stages` stand in for those of the trainer, where something else is asked of each target.
    """
    batches = held_out_batches(trainer, samples)
    layout = trainer.layout
    seen = run_micro_batches(stages or trainer.stages, batches, None)
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    return agree(layout, *seen, no_gradient).read()


def held_out_batches(trainer: Trainer, samples: Samples) -> list[Batch]:
    """This rank's micro batches of the first held-out sequences.

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
        masks = [samples.mask(n) for n in filled] if samples.shards.masked else []
        counts = np.stack([mask for mask in masks if mask is not None]) if masks else None
        separator = samples.shards.separator
        batches.append(trainer.to_batch(rows, separator, len(numbers), counts))
    return batches

"""The loss on held-out data."""

from __future__ import annotations

import math

import numpy as np
import torch

from nlscale.data import Samples
from nlscale.parallel.consensus import Verdict, agree
from nlscale.step.micro_batches import run_micro_batches
from nlscale.step.trainer import Trainer


def loss(trainer: Trainer, samples: Samples) -> dict[str, float]:
    """`loss`, nats a token, and `bits_per_byte` of the text that the tokens stand for."""
    nats = validation_loss(trainer, samples).loss
    return {
        "loss": nats,
        "bits_per_byte": nats / math.log(2) / samples.shards.bytes_per_token,
    }


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
        batches.append(trainer.to_batch(rows, samples.shards.separator, len(numbers)))
    loss_sum, seen = run_micro_batches(trainer.stages, batches, None)
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    return agree(layout, loss_sum, seen, no_gradient).read()

"""Random tokens instead of data, the same for every layout of ranks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nlscale.config.curriculum import curriculum
from nlscale.config.vocabulary import Config
from nlscale.step.micro_batches import Batch


def random_tokens(
    config: Config,
    step: int,
    data_rank: int,
    data_size: int,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """The micro batches that a data-parallel rank reads in a step, counted from 1, of one stage.

    A sample is a pure function of the run's seed and its global number, and samples are shared
    out as those of a data set are, so that every layout and every mode sees the same.
    """
    size, (stage,) = config.train.micro_batch, curriculum(config)
    first = (step - 1) * stage.global_batch
    batches = []
    for i in range(stage.global_batch // (size * data_size)):
        start = first + (i * data_size + data_rank) * size
        rows = np.stack([_sample(config, number) for number in range(start, start + size)])
        tokens = torch.from_numpy(rows).to(device)
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], size))
    return batches


def _sample(config: Config, number: int) -> NDArray[np.int64]:
    """Global sample `number`: uniform token ids, int64 [sequence + 1]."""
    assert config.model.vocabulary is not None
    generator = np.random.default_rng([config.run.seed, number])
    return generator.integers(config.model.vocabulary, size=config.data.sequence_length + 1)

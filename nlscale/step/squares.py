"""Squares of the gradients of single sequences: what Fisher's information is estimated by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nlscale.cluster.life.watch import doing
from nlscale.levels.optimizers import main_parameters
from nlscale.parallel import cpu
from nlscale.step.micro_batches import Batch, run_micro_batches
from nlscale.step.trainer import Trainer


def mean_squares(trainer: Trainer, sequences: Iterable[Batch]) -> dict[Any, Tensor]:
    """The mean over sequences of the squared gradient of each one's log-likelihood.

    That is F_i = E[(d log p(sequence) / d theta_i)^2], the diagonal of the empirical Fisher
    information (Kirkpatrick et al. 2017), where log p is the sum over the targets that count.
    Between two steps; weights, windows and counters stay as they are, and nothing crosses.

    Args:
        trainer: on every rank of the run.
        sequences: micro batches of one row, the same on every rank: ranks do not share them out,
            as their gradients would be summed before they are squared.

    Returns:
        fp32, by the weights of each shard that this rank updates (`Trainer.shards`), of its length.
    """
    optimizer = trainer.optimizer
    copies = trainer.layout.within_node.dp.size()  # of the sequence, which are summed
    found: dict[Any, Tensor] = {
        weights: torch.zeros_like(weights)
        for group in optimizer.groups
        for weights in main_parameters(group)
    }
    count = 0
    with doing("squares of gradients"):
        for sequence in sequences:
            count += 1
            for window in optimizer.windows:
                window.start_step(closes=False, apart=True)
            run_micro_batches(trainer.stages, [sequence], optimizer.windows)
            optimizer.finish_backward()
            for group in optimizer.groups:
                with cpu.cuda_by_name():
                    group.optimizer.prepare_grads()
                for weights in main_parameters(group):
                    found[weights] += (weights.grad / copies).square()
        for window in optimizer.windows:
            window.clear()
    for squares in found.values():
        squares /= max(1, count)
    return found

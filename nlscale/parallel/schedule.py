"""Forward and backward over the micro batches of a step, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nlscale.model.hope import Hope
from nlscale.parallel.window import Window

Batch = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [micro batch, sequence]."""


def run_micro_batches(
    model: Hope,
    batches: list[Batch],
    windows: list[Window] | None,
) -> tuple[Tensor, int]:
    """Pass the micro batches of this rank through the model.

    Args:
        model: this rank's part of the model.
        batches: what the rank reads in this step.
        windows: where gradients go; None for a forward pass only (validation).

    Returns:
        The sum of the losses over this rank's tokens (0 on an earlier stage) and their number.
    """
    sums: list[Tensor] = []

    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = losses.sum()
        # The schedule works on `total` in place: what is reported is a copy.
        sums.append(total.detach().clone())
        return total, torch.tensor(losses.numel(), dtype=torch.int), sums[-1]

    def forward(
        iterator: Iterator[Batch], model: Hope
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        tokens, targets = next(iterator)
        return model(tokens, targets), loss_of

    size, length = batches[0][0].shape
    model.config.no_sync_func = None if windows is None else lambda: _no_sync(windows)
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=size,
        forward_only=windows is None,
    )
    device = batches[0][0].device
    total = torch.stack(sums).sum() if sums else torch.zeros((), device=device)
    return total, sum(tokens.numel() for tokens, _ in batches)


def _no_sync(windows: list[Window]) -> ExitStack:
    """Micro batches before the last leave their gradients in the buffers."""
    stack = ExitStack()
    for window in windows:
        stack.enter_context(window.ddp.no_sync())
    return stack

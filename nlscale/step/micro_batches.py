"""Forward and backward over the micro batches of a step, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nlscale.levels.window import Window
from nlscale.model.decoder import Decoder
from nlscale.ops.documents import Documents


class Batch(NamedTuple):
    """A micro batch."""

    tokens: Tensor
    """int64 [rows, sequence]."""
    targets: Tensor
    """int64 [rows, sequence]: the tokens that follow."""
    counted: int
    """The first rows, whose loss counts; what lies below only fills the shape."""
    documents: Documents | None = None
    """Where they are, where each is to be treated as if it stood alone."""


def run_micro_batches(
    stages: list[Decoder],
    batches: list[Batch],
    windows: list[Window] | None,
) -> tuple[Tensor, int]:
    """Pass the micro batches of this rank through the model.

    Args:
        stages: what this rank holds of the model: one stage, or several interleaved.
        batches: what the rank reads in this step; with several pipeline ranks all of one shape.
        windows: where gradients go; None for a forward pass only (validation).

    Returns:
        The sum of the losses over the counted tokens (0 where the rank does not hold the last
        stage) and the number of those tokens.
    """
    sums: list[Tensor] = []

    def loss_of(losses: Tensor, counted: int) -> tuple[Tensor, Tensor, Tensor]:
        total = losses[:, :counted].sum()
        # The schedule works on `total` in place: what is reported is a copy.
        sums.append(total.detach().clone())
        return total, torch.tensor(losses.numel(), dtype=torch.int), sums[-1]

    def forward(
        iterator: Iterator[Batch], stage: Decoder
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(iterator)
        losses = stage(batch.tokens, batch.targets, batch.documents)
        return losses, partial(loss_of, counted=batch.counted)

    size, length = batches[0].tokens.shape
    stages[0].config.no_sync_func = None if windows is None else lambda: _no_sync(windows)
    # A forward pass only keeps nothing for a backward pass.
    with torch.set_grad_enabled(windows is not None):
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in stages],
            model=stages,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=windows is None,
        )
    device = batches[0].tokens.device
    total = torch.stack(sums).sum() if sums else torch.zeros((), device=device)
    return total, sum(b.counted * b.tokens.shape[1] for b in batches)


def _no_sync(windows: list[Window]) -> ExitStack:
    """Micro batches before the last leave their gradients in the buffers."""
    stack = ExitStack()
    for window in windows:
        for ddp in window.ddps:
            stack.enter_context(ddp.no_sync())
    return stack

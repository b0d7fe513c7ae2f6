"""Forward and backward over the micro batches of a step, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from nlscale.levels.window import Window
from nlscale.model.decoder import Decoder
from nlscale.ops.documents import Documents
from nlscale.ops.transfer import to_device
from nlscale.parallel.consensus import BySource


class LossMask(NamedTuple):
    """Which targets of a micro batch count, where some do not."""

    counts: Tensor
    """bool [rows, sequence]."""
    number: int
    """How many do, known to the host."""

    @classmethod
    def of(cls, counts: NDArray[np.bool_], rows: int, device: torch.device) -> LossMask | None:
        """The mask of a micro batch; None where all targets of the first rows count.

        Args:
            counts: [rows, sequence].
            rows: the first, below which nothing counts whatever is said of it.
            device: where the model is.
        """
        if counts[:rows].all():
            return None
        counts = counts & (np.arange(len(counts)) < rows)[:, None]
        return cls(to_device(counts, device), int(counts.sum()))


class RowSources(NamedTuple):
    """Of which source of a mixture each row of a micro batch is."""

    rows: Tensor
    """bool [rows, sources]: one of each row."""
    counted: NDArray[np.int64]
    """Targets of each source that count: int64 [sources], known to the host."""

    @classmethod
    def of(
        cls,
        places: NDArray[np.int64],
        sources: int,
        counts: NDArray[np.bool_] | None,
        length: int,
        device: torch.device,
    ) -> RowSources:
        """The sources of a micro batch all of whose rows are samples.

        Args:
            places: of each row its source's place among them, [rows].
            sources: how many there are.
            counts: which targets count, [rows, length]; None: all.
            length: targets of a row.
            device: where the model is.
        """
        rows = places[:, None] == np.arange(sources)
        each = np.full(len(places), length) if counts is None else counts.sum(1)
        return cls(to_device(rows, device), each @ rows)


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
    mask: LossMask | None = None
    """Which of their targets count; None: all."""
    sources: RowSources | None = None
    """Of which source each row is, where the data are a mixture."""

    @property
    def counted_tokens(self) -> int:
        """Targets that count."""
        return self.counted * self.tokens.shape[1] if self.mask is None else self.mask.number


def run_micro_batches(
    stages: list[Decoder],
    batches: list[Batch],
    windows: list[Window] | None,
    by_source: BySource | None = None,
) -> tuple[Tensor, int, int]:
    """Pass the micro batches of this rank through the model.

    Args:
        stages: what this rank holds of the model: one stage, or several interleaved.
        batches: what the rank reads in this step; with several pipeline ranks all of one shape.
        windows: where gradients go; None for a forward pass only (validation).
        by_source: of `sums_by_source`; takes the losses of each source of a mixture.

    Returns:
        The sum of the losses over the targets that count (0 where the rank does not hold the last
        stage), the tokens of the counted rows, and how many of their targets count.
    """
    sums: list[Tensor] = []

    def loss_of(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if batch.mask is None:
            total = losses[:, : batch.counted].sum()
        else:  # not a product: 0 times a loss that is not finite is none either
            total = losses.where(batch.mask.counts.T, 0.0).sum()
        # The schedule works on `total` in place: what is reported is a copy.
        sums.append(total.detach().clone())
        if by_source is not None:
            _add(by_source, losses.detach(), batch)
        return total, torch.tensor(losses.numel(), dtype=torch.int), sums[-1]

    def forward(
        iterator: Iterator[Batch], stage: Decoder
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(iterator)
        losses = stage(batch.tokens, batch.targets, batch.documents)
        return losses, partial(loss_of, batch=batch)

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
    tokens = sum(b.counted * b.tokens.shape[1] for b in batches)
    return total, tokens, sum(b.counted_tokens for b in batches)


def sums_by_source(batches: list[Batch]) -> BySource | None:
    """Where the losses of a step are added up by source; None: the data are no mixture."""
    each = [batch.sources.counted for batch in batches if batch.sources is not None]
    if not each:
        return None
    counted = np.sum(each, axis=0)
    device = batches[0].tokens.device
    return BySource(torch.zeros(len(counted), dtype=torch.float64, device=device), counted)


def _add(by_source: BySource, losses: Tensor, batch: Batch) -> None:
    """Add the losses of a micro batch, [sequence, rows], to the sum of each row's source."""
    assert batch.sources is not None
    if batch.mask is not None:
        losses = losses.where(batch.mask.counts.T, 0.0)
    rows = losses.double().sum(0)[:, None]
    # not by adding rows at indices, whose order, and so the rounding, a GPU leaves open
    by_source.loss_sums.add_(torch.where(batch.sources.rows, rows, 0.0).sum(0))


def _no_sync(windows: list[Window]) -> ExitStack:
    """Micro batches before the last leave their gradients in the buffers."""
    stack = ExitStack()
    for window in windows:
        for ddp in window.ddps:
            stack.enter_context(ddp.no_sync())
    return stack

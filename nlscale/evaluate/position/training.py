"""Loss by position in the context while a run trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.data import Samples
from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.loss import held_out_batches
from nlscale.evaluate.stand_in import StandIn
from nlscale.model.decoder import Decoder
from nlscale.ops.documents import Documents
from nlscale.step.micro_batches import Batch, run_micro_batches
from nlscale.step.trainer import Trainer

_RANGES = 4
_TIMES = 4
"""The end of a range is so many times that of the one before."""
_SHORTEST = 8
"""The least that the first range may have, in tokens."""


def positions(trainer: Trainer, samples: Samples) -> dict[str, float | None]:
    """`FROM-TO/loss`, nats a token that counts, of the targets in a range of positions.

    A target is at position n if n tokens of its sample were read before it; those of a range are
    the ones with FROM < n <= TO. The ranges are of `ranges_of` and share out all targets of the
    sequences that the validation loss is of: that is their mean, weighted by targets. None where
    no target of a range counts.
    """
    batches = held_out_batches(trainer, samples)
    length = batches[0].tokens.shape[1]
    # nats, and targets that count, by position
    sums = torch.zeros(2, length, dtype=torch.float64, device=trainer.layout.device)
    stages = cast(list[Decoder], [_Summing(s, batches, sums) for s in trainer.stages])
    run_micro_batches(stages, batches, None)
    if not trainer.layout.speaks:
        sums.zero_()
    dist.all_reduce(sums)
    found: dict[str, float | None] = {}
    for low, high in ranges_of(length):
        nats, counted = sums[:, low:high].sum(1).tolist()
        name = f"{shown(low) if low else 0}-{shown(high)}/loss"
        found[name] = nats / counted if counted else None
    return found


def ranges_of(length: int) -> list[tuple[int, int]]:
    """Ranges of positions of a context, from the first: the ends are length, length / 4, ..."""
    ends = [length]
    while len(ends) < _RANGES and ends[0] // _TIMES >= _SHORTEST:
        ends.insert(0, ends[0] // _TIMES)
    return list(zip([0, *ends[:-1]], ends, strict=True))


class _Summing(StandIn):
    """A stage that adds its losses up by position, where it is the last.

    Args:
        stage: of the trainer.
        batches: those that it will read, in this order.
        sums: [2, sequence], float64, to which nats and targets are added.
    """

    def __init__(self, stage: Decoder, batches: Iterable[Batch], sums: Tensor) -> None:
        super().__init__(stage)
        self._batches, self._sums = iter(batches), sums

    def forward(self, tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        """Loss of each token in nats, fp32 [sequence, batch]; on an earlier stage its output."""
        (stage,) = self._stage
        out = stage(tokens, targets, documents)
        if stage.is_last:
            batch = next(self._batches)
            self._sums[0] += _counting(out, batch).double().sum(1)
            self._sums[1] += _counting(torch.ones_like(out), batch).double().sum(1)
        return out


def _counting(values: Tensor, batch: Batch) -> Tensor:
    """Values of targets, [sequence, rows], with 0 or nothing for those that do not count."""
    if batch.mask is None:
        return values[:, : batch.counted]
    # not a product: 0 times a loss that is not finite is none either
    return values.where(batch.mask.counts.T, 0.0)

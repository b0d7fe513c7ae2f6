"""What single rows of tokens cost a model while a run trains: their nats, row by row."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nlscale.parallel.consensus import BySource, Verdict, agree
from nlscale.step.micro_batches import RowSources, run_micro_batches, sums_by_source
from nlscale.step.trainer import Trainer


def row_nats(
    trainer: Trainer, rows: NDArray[np.int64], counts: NDArray[np.bool_], separator: int
) -> NDArray[np.float64]:
    """-log p of the targets of each row that count, summed, in nats.

    Collective; the data-parallel ranks share the rows out, and every layout can.

    Args:
        trainer: whose model is asked.
        rows: token ids, [n, data.sequence_length + 1].
        counts: which of them count as targets, like it; of each row one at least.
        separator: of documents.

    Returns:
        [n], the same on every rank; NaN where the loss of some row is not finite.
    """
    layout = trainer.layout
    size, group = trainer.config.train.micro_batch, trainer.config.parallel.pipeline
    count = -(-len(rows) // (size * layout.data_size * group)) * group
    mine = [*range(layout.data_rank, len(rows), layout.data_size)]
    mine += [0] * (count * size - len(mine))  # read again: its mean stays as it is
    batches = []
    for i in range(count):
        places = np.array(mine[i * size : (i + 1) * size])
        batch = trainer.to_batch(rows[places], separator, size, counts[places])
        sources = RowSources.of(
            places, len(rows), counts[places][:, 1:], rows.shape[1] - 1, layout.device
        )
        batches.append(batch._replace(sources=sources))
    by_row = sums_by_source(batches)
    seen = run_micro_batches(trainer.stages, batches, None, by_row)
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    verdict = agree(layout, *seen, no_gradient, by_source=by_row).read()
    return _sums(verdict, counts)


def gathered(
    trainer: Trainer, mine: NDArray[np.int64], nats: NDArray[np.float64], counts: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The same where this rank has read the rows `mine` by itself, and found `nats` of each."""
    layout = trainer.layout
    sums = torch.zeros(len(counts), dtype=torch.float64, device=layout.device)
    sums[torch.from_numpy(mine).to(layout.device)] = torch.from_numpy(nats).to(layout.device)
    counted = np.zeros(len(counts), np.int64)
    counted[mine] = counts[mine, 1:].sum(1)
    whole = sums.sum().float(), int(counted.sum()), int(counted.sum())
    no_gradient = torch.ones((), dtype=torch.bool, device=layout.device)
    verdict = agree(layout, *whole, no_gradient, by_source=BySource(sums, counted)).read()
    return _sums(verdict, counts)


def _sums(verdict: Verdict, counts: NDArray[np.bool_]) -> NDArray[np.float64]:
    if verdict.losses_not_finite:  # the sums by row have zeros in their place
        return np.full(len(counts), np.nan)
    return np.array(verdict.source_losses) * counts[:, 1:].sum(1)

"""What all ranks must agree on after each step, in one small reduction.

The device acts on it at once; the host reads it when the update is under way.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nlscale.ops.transfer import HostCopy, to_device
from nlscale.parallel.layout import Layout


@dataclass(frozen=True)
class Requests:
    """What a rank asks of all of them; of the verdict: what any of them asked."""

    stop: bool = False
    """To end after this step."""
    save: bool = False
    """To write a checkpoint after this step."""
    failed: bool = False
    """To give up: a checkpoint could not be written."""


class BySource(NamedTuple):
    """What a rank saw of a step, for each source of a mixture."""

    loss_sums: Tensor
    """Sums of the losses of its targets that count: float64 [sources]."""
    counted: NDArray[np.int64]
    """How many these are, known to the host: int64 [sources]."""


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    loss: float
    """Nats a token, mean over the targets of the global batch that count; NaN where some rank's was
    not finite, and where none counts."""
    tokens: int
    """Tokens of the step, over all ranks, whether or not they count."""
    admitted: bool
    """False: some rank's loss or gradient was not finite, or the loss was above the limit; the
    step is dropped everywhere."""
    asked: Requests
    """What some rank asked for."""
    losses_not_finite: int = 0
    """Ranks whose loss was not finite."""
    limit: float = float("inf")
    """Loss above which the step is dropped."""
    counted_tokens: int = 0
    """Targets of the step that count, over all ranks."""
    node_counted: tuple[int, ...] = ()
    """The same of each node (`Layout.nodes`)."""
    source_losses: tuple[float, ...] = ()
    """Of each source of a mixture, as `loss`; NaN where none of its targets is in the step."""
    source_counted: tuple[int, ...] = ()
    """Targets of each that count, over all ranks."""
    squares: tuple[float, ...] = ()
    """Sums over all ranks of what each gave of its own, see `agree`."""

    @property
    def dropped_because(self) -> str | None:
        """Why the step was dropped, in words; None: it was not."""
        if self.admitted:
            return None
        if self.losses_not_finite:
            return LOSS_NOT_FINITE
        if self.loss > self.limit:
            return f"{SPIKE}: loss {self.loss:.4g} above {self.limit:.4g}"
        return GRADIENT_NOT_FINITE


LOSS_NOT_FINITE = "loss not finite"
GRADIENT_NOT_FINITE = "gradient not finite"
SPIKE = "spike"
_HEAD = 5 + len(fields(Requests))
"""Numbers of a report before those of nodes and sources."""


class Consensus:
    """A verdict where the device has it, and on its way to the host.

    Args:
        report: what the ranks saw together: `_HEAD` numbers, then of each node how many targets
            count, then of each source the sum of its losses, and then of each how many targets
            these are of; then squares.
        limit: loss above which the step is dropped.
        nodes: that share the batch.
        sources: of a mixture; 0: there is none.
    """

    def __init__(self, report: Tensor, limit: float, nodes: int = 1, sources: int = 0) -> None:
        total, tokens, counted, bad, bad_losses, *wishes = report[:_HEAD]
        of_nodes, of_sources, squares = report[_HEAD:].tensor_split([nodes, nodes + 2 * sources])
        self._limit = limit
        loss = torch.where(bad_losses > 0, torch.nan, total / counted)
        self.admitted = (bad == 0) & ~(loss > limit)
        """bool []."""
        self.counted_tokens = torch.where(self.admitted, counted, 0.0)
        """Targets that count and enter the windows: none where the step is dropped. float64 []."""
        self.node_counted = torch.where(self.admitted, of_nodes, 0.0)
        """The same of each node: float64 [nodes]."""
        seen = torch.stack([loss, tokens, counted, self.admitted.double(), bad_losses, *wishes])
        seen = torch.cat([seen, of_nodes])
        if sources:
            sums, of = of_sources.view(2, sources)
            losses = torch.where(bad_losses > 0, torch.nan, sums / of)
            seen = torch.cat([seen, losses, of])
        seen = torch.cat([seen, squares])
        self._nodes, self._sources = nodes, sources
        self._copy = HostCopy(seen)

    def read(self) -> Verdict:
        """The verdict; the host waits until the GPU has come to it."""
        seen = self._copy.read()
        loss, tokens, counted, admitted, bad_losses, *wishes = seen[:_HEAD]
        first = _HEAD + self._nodes
        last = first + self._sources
        end = last + self._sources
        return Verdict(
            loss=loss,
            tokens=round(tokens),
            counted_tokens=round(counted),
            admitted=bool(admitted),
            asked=Requests(*map(bool, wishes)),
            losses_not_finite=round(bad_losses),
            limit=self._limit,
            node_counted=tuple(map(round, seen[_HEAD:first])),
            source_losses=tuple(seen[first:last]),
            source_counted=tuple(map(round, seen[last:end])),
            squares=tuple(seen[end:]),
        )


def agree(
    layout: Layout,
    loss_sum: Tensor,
    tokens: int,
    counted_tokens: int,
    finite: Tensor,
    requests: Requests | None = None,
    limit: float = float("inf"),
    by_source: BySource | None = None,
    squares: Tensor | None = None,
) -> Consensus:
    """Combine what the ranks saw of a step.

    Args:
        layout: this rank's place.
        loss_sum: sum of the losses of this rank's targets that count, 0 where it saw none.
        tokens: that it saw.
        counted_tokens: how many of their targets count.
        finite: whether the gradient was finite here, bool []; of the loss it is seen here.
        requests: what this rank asks for.
        limit: loss above which the step is dropped; the same on every rank.
        by_source: the same sums and counts for each source of a mixture; None on every rank: there
            is none.
        squares: numbers to be added up over all ranks, float64; as many on every rank.
    """
    # Every rank of a copy of the model sees the same batch; one of them speaks for it.
    speaks, good_loss = layout.speaks, torch.isfinite(loss_sum)
    asked = astuple(requests or Requests())
    # From the host in one piece: a number written into a tensor on a GPU is a copy that waits.
    seen = [tokens, counted_tokens] if speaks else [0, 0]
    sources = 0 if by_source is None else len(by_source.counted)
    of_sources = _HEAD + layout.nodes
    known = np.zeros(of_sources + 2 * sources)
    known[:_HEAD] = [0, *seen, 0, 0, *asked]
    known[_HEAD + layout.node_rank] = seen[1]
    if by_source is not None and speaks:
        known[of_sources + sources :] = by_source.counted
    report = to_device(known, layout.device)
    if speaks:
        report[0] = torch.where(good_loss, loss_sum, torch.zeros_like(loss_sum))
        if by_source is not None:
            sums = by_source.loss_sums.nan_to_num(0.0, 0.0, 0.0)
            report[of_sources : of_sources + sources] = sums
    report[3] = ~(finite & good_loss)
    report[4] = ~good_loss
    if squares is not None:
        report = torch.cat([report, squares])
    dist.all_reduce(report)
    return Consensus(report, limit, layout.nodes, sources)

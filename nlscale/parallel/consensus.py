"""What all ranks must agree on after each step, in one small reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nlscale.parallel.layout import Layout


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    loss: float
    """Nats per token, mean over the global batch."""
    tokens: int
    """Tokens of the step, over all ranks."""
    admitted: bool
    """False: some rank's loss or gradient was not finite, and the step is dropped everywhere."""
    stop: bool
    """Some rank was asked to stop."""


def agree(
    layout: Layout, loss_sum: torch.Tensor, tokens: int, finite: torch.Tensor, stop: bool
) -> Verdict:
    """Combine what the ranks saw of a step.

    Args:
        layout: this rank's place.
        loss_sum: sum of the losses of this rank's tokens, 0 where it saw none.
        tokens: how many those were.
        finite: whether loss and gradient were finite here.
        stop: whether this rank was asked to stop.
    """
    # Every rank of a copy of the model sees the same batch; one of them speaks for it.
    speaks = layout.speaks
    ok = finite & torch.isfinite(loss_sum)
    report = torch.zeros(4, dtype=torch.float64, device=layout.device)
    report[0] = torch.where(ok, loss_sum, torch.zeros_like(loss_sum)) if speaks else 0.0
    report[1] = tokens if speaks else 0
    report[2] = ~ok
    report[3] = stop
    dist.all_reduce(report)
    total, count, bad, stopping = report.tolist()
    loss = total / count if count and not bad else float("nan")
    return Verdict(loss, int(count), not bad, bool(stopping))

"""What all ranks must agree on after each step, in one small reduction."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

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


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    loss: float
    """Nats per token, mean over the global batch."""
    tokens: int
    """Tokens of the step, over all ranks."""
    admitted: bool
    """False: some rank's loss or gradient was not finite, and the step is dropped everywhere."""
    asked: Requests
    """What some rank asked for."""


def agree(
    layout: Layout,
    loss_sum: torch.Tensor,
    tokens: int,
    finite: torch.Tensor,
    requests: Requests | None = None,
) -> Verdict:
    """Combine what the ranks saw of a step.

    Args:
        layout: this rank's place.
        loss_sum: sum of the losses of this rank's tokens, 0 where it saw none.
        tokens: how many those were.
        finite: whether loss and gradient were finite here.
        requests: what this rank asks for.
    """
    # Every rank of a copy of the model sees the same batch; one of them speaks for it.
    speaks = layout.speaks
    ok = finite & torch.isfinite(loss_sum)
    asked = astuple(requests or Requests())
    report = torch.zeros(3 + len(asked), dtype=torch.float64, device=layout.device)
    report[0] = torch.where(ok, loss_sum, torch.zeros_like(loss_sum)) if speaks else 0.0
    report[1] = tokens if speaks else 0
    report[2] = ~ok
    for i, wish in enumerate(asked, 3):
        report[i] = wish
    dist.all_reduce(report)
    total, count, bad, *wishes = report.tolist()
    loss = total / count if count and not bad else float("nan")
    return Verdict(loss, int(count), not bad, Requests(*map(bool, wishes)))

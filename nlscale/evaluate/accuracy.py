"""How often the most likely token is the right one, while a run trains on a task."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.data import Samples
from nlscale.data.tasks.table import task_of_index
from nlscale.errors import UserError
from nlscale.evaluate.loss import validation_loss
from nlscale.evaluate.stand_in import StandIn
from nlscale.model.decoder import Decoder
from nlscale.model.layers import vocabulary_group
from nlscale.ops.documents import Documents
from nlscale.step.trainer import Trainer


def accuracy(trainer: Trainer, samples: Samples) -> dict[str, float | None]:
    """`accuracy` over the targets that count of the first held-out examples, and `chance`.

    It reads those that the validation loss is of; None where none of their targets counts.

    Raises:
        UserError: the data are not those of a task, or a sample is not one of its examples.
    """
    task = task_of_index(samples.shards.index, samples.shards.directory)
    if samples.sequence_length != task.length:
        raise UserError(
            f"evaluate: an example of {task} has {task.length} tokens, and data.sequence_length is "
            f"{samples.sequence_length}, which cuts examples apart; set it to {task.length}"
        )
    stages = cast(list[Decoder], [_Hits(stage) for stage in trainer.stages])
    verdict = validation_loss(trainer, samples, stages)
    hits = verdict.loss if verdict.counted_tokens else None
    return {"accuracy": hits, "chance": task.chance}


class _Hits(StandIn):
    """A stage that says of each target whether it is the most likely token, instead of its loss."""

    def forward(self, tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        """1 or 0 a token, fp32 [sequence, batch]; on an earlier stage its output."""
        (stage,) = self._stage
        x, _ = stage.hidden(tokens, carry=False, documents=documents)
        if not stage.is_last:
            return x
        return (most_likely(stage.logits(x), vocabulary_group()) == targets.T).float()


def most_likely(logits: Tensor, group: Any) -> Tensor:
    """The token of the largest logit, of equal ones the first.

    Args:
        logits: [..., vocabulary / ranks], of this rank's part of the vocabulary.
        group: the ranks that share it.

    Returns:
        int64 [...], the same on each of them.
    """
    best, token = logits.max(-1)
    mine = torch.stack([best.double(), (token + group.rank() * logits.shape[-1]).double()])
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    values, tokens = torch.stack(parts, dim=1)
    return tokens.gather(0, values.argmax(0, keepdim=True))[0].long()

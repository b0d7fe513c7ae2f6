"""Levels that learn inside the context (objective `ntp`) while a stream is learned.

Scores are then taken as `nlscale eval loss` takes them: each loss before anything was learned from
its token. Of levels with `reset: never` every sequence begins with what they have learned from the
training text, which the hook here has them read; scores leave no trace in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlscale.config.in_context import InContext, in_context
from nlscale.config.vocabulary import ContextObjective, ContextReset
from nlscale.continual.methods.options import LearnOptions
from nlscale.errors import UserError
from nlscale.evaluate.rows import gathered
from nlscale.generate.learning import LearningStream
from nlscale.model.decoder import Decoder
from nlscale.step.swap import stand_in
from nlscale.step.trainer import Trainer
from nlscale.train.hooks.hook import Hook

CHANGE = "context_change"
"""Kind of tensors in checkpoints: what levels that are never reset have added to the weights."""


class Learn(Hook):
    """Has levels with `reset: never` read the last training samples whenever it is called.

    Each sample is a sequence of its own; what is left of a chunk at the end of a call is dropped.
    """

    Options = LearnOptions
    one_length = True

    def begin(self) -> None:
        levels_that_learn(self.run.trainer)

    def on_update(self) -> None:
        trainer = self.run.trainer
        levels = levels_that_learn(trainer)
        with _still(trainer) as stage:
            stream = _begun(stage, trainer, 1, levels, kept_changes(trainer))
            for batch in self.run.last_sequences(self.options.sequences):
                stream.begin()
                stream.learn(torch.cat([batch.tokens, batch.targets[:, -1:]], 1))
            stream.begin()  # which learns from the chunk that was open
        _keep(trainer, stream.changes())


def levels_that_learn(trainer: Trainer) -> list[InContext]:
    """The levels of objective `ntp`, fastest first; none: the model is asked as it is.

    Raises:
        UserError: there are some, and the model is split, or documents are kept apart.
    """
    config = trainer.config
    levels, parallel = in_context(config, ContextObjective.ntp), config.parallel
    if levels and parallel.tensor * parallel.pipeline > 1:
        raise UserError(
            f"levels learn inside the context of a whole model, and it is split (parallel.tensor "
            f"{parallel.tensor}, parallel.pipeline {parallel.pipeline}); set both to 1"
        )
    if levels and config.data.document_mask:
        raise UserError(
            "levels learn inside the context of whole sequences, and data.document_mask keeps "
            "documents apart; turn it off, or let no level have context.objective ntp"
        )
    return levels


def learned_nats(
    trainer: Trainer,
    levels: Sequence[InContext],
    rows: NDArray[np.int64],
    counts: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """`nlscale.evaluate.rows.row_nats` where levels learn from each row while it is read."""
    layout, size = trainer.layout, trainer.config.train.micro_batch
    mine, start = np.arange(layout.data_rank, len(rows), layout.data_size), kept_changes(trainer)
    found = [np.zeros(0)]
    with _still(trainer) as stage:
        for first in range(0, len(mine), size):
            some = mine[first : first + size]
            stream = _begun(stage, trainer, len(some), levels, start)
            nats = stream.feed(torch.from_numpy(rows[some]))[:, 1:].double().cpu().numpy()
            found.append(np.where(counts[some, 1:], nats, 0).sum(1))
    return gathered(trainer, mine, np.concatenate(found), counts)


def kept_changes(trainer: Trainer) -> dict[str, Tensor]:
    """What levels that are never reset have changed, by the names of the parameters; of those
    without a name nothing. Collective."""
    if CHANGE not in trainer.kept:
        return {}
    names = _changed_names(trainer)
    with stand_in(trainer, CHANGE):
        own = trainer.named_parameters()
        return {name: own[name].detach().clone() for name in names}


def _keep(trainer: Trainer, changes: dict[str, Tensor]) -> None:
    names, kept = _changed_names(trainer), {}
    for shard in trainer.shards():
        kept[shard.weights] = torch.zeros_like(shard.weights)
        if shard.name in names:
            flat = changes[shard.name][0].flatten()
            kept[shard.weights].copy_(flat[shard.start : shard.start + len(shard.weights)])
    trainer.kept[CHANGE] = kept


def _changed_names(trainer: Trainer) -> set[str]:
    levels = in_context(trainer.config, ContextObjective.ntp)
    return {
        f"blocks.{depth}.cms.mlps.{level.mlp}.{part}.weight"
        for level in levels
        if level.keys.reset == ContextReset.never
        for depth in level.depths
        for part in ("up", "down")
    }


def _begun(
    stage: Decoder,
    trainer: Trainer,
    batch: int,
    levels: Sequence[InContext],
    start: dict[str, Tensor],
) -> LearningStream:
    """Sequences whose weights are changed by `start` to begin with."""
    vocabulary = trainer.config.model.vocabulary
    assert vocabulary is not None, "a run knows its own"
    stream = LearningStream(stage, vocabulary, batch, levels)
    for name, change in stream.changes().items():
        if name in start:
            change.copy_(start[name].expand_as(change))
    return stream


@contextmanager
def _still(trainer: Trainer) -> Iterator[Decoder]:
    """The model, whose own weights take no gradient: nothing enters the windows of the run."""
    (stage,) = trainer.stages
    takes = [p for p in stage.parameters() if p.requires_grad]
    for p in takes:
        p.requires_grad_(False)
    try:
        yield stage
    finally:
        for p in takes:
            p.requires_grad_(True)

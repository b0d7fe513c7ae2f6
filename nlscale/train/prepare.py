"""Whether a run can start: sizes that divide, data that are there. Before any process group."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from nlscale.cluster.life.place import place
from nlscale.config.curriculum import TrainingStage, curriculum, lengths
from nlscale.config.vocabulary import Config
from nlscale.data import BatchReader, Samples, TokenShards
from nlscale.data.index import Index, tokenizer_of
from nlscale.data.order import seed_of_cut
from nlscale.data.tasks.table import task_of_index
from nlscale.errors import UserError
from nlscale.evaluate.table import check as check_evaluations
from nlscale.levels.spectrum import Level, levels_of
from nlscale.plan.checks import check_sizes, not_divisible
from nlscale.train.cached import check_cache


@dataclass
class Prepared:
    """What a checked run stands on."""

    levels: list[Level]
    stages: list[TrainingStage]
    readers: list[BatchReader]
    """Of each cut of the data, see `nlscale.config.curriculum`."""
    validation: Samples
    """At the sequence length with which the run begins."""
    validation_of_end: Samples | None
    """At that with which it ends, where that is another."""
    vocabulary: int
    data: dict[str, Any]
    """What identifies the data: the same data in another folder have the same."""
    notes: list[str] = field(default_factory=list)
    """What there is to say of the data, each in a line."""

    @property
    def reader(self) -> BatchReader:
        """Of the cut with which the run begins; all are of the same shards."""
        return self.readers[0]


def prepare(config: Config) -> Prepared:
    """Check sizes, open the data and fill in what follows from them.

    Sets `model.vocabulary` where it was null. Every shard must be there with its size; checksums
    are compared once the ranks have met (`nlscale.train.verify_data`).

    Raises:
        UserError: one line with the numbers and a fix.
    """
    model, stages = config.model, curriculum(config)
    data_parallel = check_sizes(config, place().world)
    levels = levels_of(config)
    check_evaluations(config.evaluate)
    shards = TokenShards(config.data.dir, "train", verify=False, cache=config.data.cache)
    held_out = shards.beside("validation")
    if not shards.counted_tokens:
        raise UserError(
            f"no token of the train split of {config.data.dir} counts as a target; mend the masks "
            f"of its sources and build it again"
        )
    for length in lengths(stages):
        _check_task(config, shards, length)
        _check_packed(shards, length)
    model.vocabulary = model.vocabulary or shards.vocabulary
    if model.vocabulary < shards.vocabulary:
        raise UserError(
            f"model.vocabulary {model.vocabulary} is smaller than the {shards.vocabulary} "
            f"token ids of {config.data.dir}; leave it null"
        )
    if model.vocabulary % config.parallel.tensor:
        raise UserError(not_divisible("model.vocabulary", model.vocabulary, config.parallel.tensor))
    in_step = max(stage.global_batch for stage in stages) // data_parallel  # of a rank
    here = min(data_parallel, place().local_world)
    first, last = stages[0].sequence_length, stages[-1].sequence_length
    return Prepared(
        levels=levels,
        stages=stages,
        readers=[
            BatchReader(Samples(shards, length), seed_of_cut(config.run.seed, cut))
            for cut, length in enumerate(lengths(stages))
        ],
        validation=Samples(held_out, first),
        validation_of_end=Samples(held_out, last) if last != first else None,
        vocabulary=model.vocabulary,
        data=_identity(shards.index),
        notes=[*_packed_together(config, shards), *check_cache([shards, held_out], here * in_step)],
    )


def _check_task(config: Config, shards: TokenShards, length: int) -> None:
    """Refuse what would cut the examples of a task apart: each is a sample."""
    if "task" not in shards.index:
        return
    task = task_of_index(shards.index, shards.directory)
    if length != task.length:
        raise UserError(
            f"an example of {task} has {task.length} tokens, and data.sequence_length is {length}, "
            f"which cuts examples apart; set it to {task.length}"
        )
    if config.data.document_mask:
        raise UserError(
            f"data.document_mask would begin the memory anew at each padding of an example of "
            f"{task}; set it to false"
        )


def _check_packed(shards: TokenShards, length: int) -> None:
    """Refuse samples of another length than documents were packed into."""
    packed = shards.index.get("packed")
    if packed is not None and length != packed["length"]:
        raise UserError(
            f"the documents of {shards.directory} are packed into samples of {packed['length']} "
            f"tokens, and data.sequence_length is {length}, which cuts them; "
            f"set it to {packed['length']}, or build the data with --pack of another length"
        )


def _packed_together(config: Config, shards: TokenShards) -> list[str]:
    """What there is to say of documents that are packed into samples with others."""
    if "packed" not in shards.index or config.data.document_mask:
        return []
    return [
        f"the documents of {shards.directory} are packed into samples with others, which they see: "
        f"data.document_mask is false; true reads each as if it stood alone"
    ]


def _identity(index: Index) -> dict[str, Any]:
    sums = [
        shard["sha256"]
        for name in ("train", "validation")
        for shard in index["splits"][name]["shards"]
    ]
    tokenizer = tokenizer_of(index)
    return {
        "fingerprint": hashlib.sha256("".join(sums).encode()).hexdigest(),
        "train_tokens": index["splits"]["train"]["tokens"],
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }

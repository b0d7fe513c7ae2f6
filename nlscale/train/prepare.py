"""Whether a run can start: sizes that divide, data that are there. Before any process group."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from nlscale.cluster.life.place import place
from nlscale.config.vocabulary import Config
from nlscale.data import BatchReader, Samples, TokenShards
from nlscale.data.index import Index, tokenizer_of
from nlscale.data.tasks.table import task_of_index
from nlscale.errors import UserError
from nlscale.evaluate.table import check as check_evaluations
from nlscale.levels.spectrum import Level, spectrum
from nlscale.plan.checks import check_sizes, not_divisible
from nlscale.train.cached import check_cache


@dataclass
class Prepared:
    """What a checked run stands on."""

    levels: list[Level]
    reader: BatchReader
    validation: Samples
    vocabulary: int
    micro_batches: int
    """Micro batches a rank passes through the model in a step."""
    tokens_per_step: int
    data: dict[str, Any]
    """What identifies the data: the same data in another folder have the same."""
    notes: list[str] = field(default_factory=list)
    """What there is to say of the data, each in a line."""


def prepare(config: Config) -> Prepared:
    """Check sizes, open the data and fill in what follows from them.

    Sets `model.vocabulary` where it was null. Every shard must be there with its size; checksums
    are compared once the ranks have met (`nlscale.train.verify_data`).

    Raises:
        UserError: one line with the numbers and a fix.
    """
    train, model = config.train, config.model
    data_parallel = check_sizes(config, place().world)
    tokens_per_step = train.global_batch * config.data.sequence_length
    levels = spectrum(config.levels, tokens_per_step)
    check_evaluations(config.evaluate)
    shards = TokenShards(config.data.dir, "train", verify=False, cache=config.data.cache)
    held_out = shards.beside("validation")
    if not shards.counted_tokens:
        raise UserError(
            f"no token of the train split of {config.data.dir} counts as a target; mend the masks "
            f"of its sources and build it again"
        )
    _check_task(config, shards)
    notes = _check_packed(config, shards)
    model.vocabulary = model.vocabulary or shards.vocabulary
    if model.vocabulary < shards.vocabulary:
        raise UserError(
            f"model.vocabulary {model.vocabulary} is smaller than the {shards.vocabulary} "
            f"token ids of {config.data.dir}; leave it null"
        )
    if model.vocabulary % config.parallel.tensor:
        raise UserError(not_divisible("model.vocabulary", model.vocabulary, config.parallel.tensor))
    in_step = train.global_batch // data_parallel  # of a rank
    here = min(data_parallel, place().local_world)
    return Prepared(
        levels=levels,
        reader=BatchReader(Samples(shards, config.data.sequence_length), config.run.seed),
        validation=Samples(held_out, config.data.sequence_length),
        vocabulary=model.vocabulary,
        micro_batches=train.global_batch // (train.micro_batch * data_parallel),
        tokens_per_step=tokens_per_step,
        data=_identity(shards.index),
        notes=[*notes, *check_cache([shards, held_out], here * in_step)],
    )


def _check_task(config: Config, shards: TokenShards) -> None:
    """Refuse what would cut the examples of a task apart: each is a sample."""
    if "task" not in shards.index:
        return
    task, length = task_of_index(shards.index, shards.directory), config.data.sequence_length
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


def _check_packed(config: Config, shards: TokenShards) -> list[str]:
    """Refuse samples of another length than documents were packed into; what else there is to say.

    Raises:
        UserError: they are of another length.
    """
    packed = shards.index.get("packed")
    if packed is None:
        return []
    if config.data.sequence_length != packed["length"]:
        raise UserError(
            f"the documents of {shards.directory} are packed into samples of {packed['length']} "
            f"tokens, and data.sequence_length is {config.data.sequence_length}, which cuts them; "
            f"set it to {packed['length']}, or build the data with --pack of another length"
        )
    if config.data.document_mask:
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

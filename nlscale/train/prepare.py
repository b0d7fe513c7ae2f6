"""Whether a run can start: sizes that divide, data that are there. Before any process group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nlscale.cluster.life.place import place
from nlscale.config.vocabulary import Config
from nlscale.data import BatchReader, Samples, TokenShards
from nlscale.data.folders import Folder, open_folders
from nlscale.data.history import Ordered, identity, is_mixed
from nlscale.data.reader import MixtureReader
from nlscale.data.tasks.table import task_of_index
from nlscale.errors import UserError
from nlscale.evaluate.table import check as check_evaluations
from nlscale.levels.spectrum import Level, spectrum
from nlscale.plan.checks import check_sizes, not_divisible
from nlscale.train.cached import check_cache
from nlscale.train.mixed import HeldOut, data_from, held_out, order_of, reader_of


@dataclass
class Prepared:
    """What a checked run stands on."""

    levels: list[Level]
    reader: BatchReader | MixtureReader
    sources: Ordered | None
    """The sources of a mixture, by their place in batches, and their order; None: there is one."""
    folders: list[Folder]
    """The data folders, whose shards are there with their sizes."""
    validation: list[HeldOut]
    """What a validation reads of each folder."""
    vocabulary: int
    micro_batches: int
    """Micro batches a rank passes through the model in a step."""
    tokens_per_step: int
    data: dict[str, Any]
    """What identifies the data: the same data in another folder have the same."""
    notes: list[str] = field(default_factory=list)
    """What there is to say of the data, each in a line."""

    def epochs(self, tokens: int) -> dict[str, float]:
        """How often the run, of so many tokens, reads each source of a mixture, or "its data"."""
        if self.sources is None:
            return {"its data": tokens / self.data["train_tokens"]}
        counts = self.sources.order.counts(self.sources.order.end).tolist()
        each = zip(self.sources.names, counts, self.sources.lengths, strict=True)
        return {name: count / length for name, count, length in each}


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
    folders, notes = open_folders(config.data), []
    shards = folders[0].train
    for folder in folders:
        _check_task(config, folder.train)
        notes += _check_packed(config, folder.train)
    model.vocabulary = model.vocabulary or shards.vocabulary
    if model.vocabulary < shards.vocabulary:
        raise UserError(
            f"model.vocabulary {model.vocabulary} is smaller than the {shards.vocabulary} "
            f"token ids of {shards.directory}; leave it null"
        )
    if model.vocabulary % config.parallel.tensor:
        raise UserError(not_divisible("model.vocabulary", model.vocabulary, config.parallel.tensor))
    in_step = train.global_batch // data_parallel  # of a rank
    here = min(data_parallel, place().local_world)
    data = identity(folders, config.data.sequence_length, mixed=bool(config.data.mixture))
    # one that changes on resuming is checked with what was read before
    checked = "data.mixture" not in config.resume.allow
    sources, reader = _order_and_reader(config, folders, data, checked)
    splits = [split for folder in folders for split in (folder.train, folder.held_out)]
    return Prepared(
        levels=levels,
        reader=reader,
        sources=sources,
        folders=folders,
        validation=held_out(folders, config),
        vocabulary=model.vocabulary,
        micro_batches=train.global_batch // (train.micro_batch * data_parallel),
        tokens_per_step=tokens_per_step,
        data=data,
        notes=[*notes, *check_cache(splits, here * in_step)],
    )


def go_on(config: Config, prepared: Prepared, state: dict[str, Any] | None) -> Prepared:
    """What a run stands on that goes on from the state of a checkpoint; None: it begins.

    Of a mixture that has changed since, which `resume.allow` has let pass, the new weights hold
    from the next sample on.

    Raises:
        UserError: the mixture ends before the run does.
    """
    data = data_from(state, prepared.data, prepared.folders, config)
    if not is_mixed(data):
        return prepared
    sources, reader = _order_and_reader(config, prepared.folders, data)
    return replace(prepared, data=data, sources=sources, reader=reader)


def _order_and_reader(
    config: Config, folders: list[Folder], data: dict[str, Any], checked: bool = True
) -> tuple[Ordered | None, BatchReader | MixtureReader]:
    if not is_mixed(data):
        samples = Samples(folders[0].train, config.data.sequence_length)
        return None, BatchReader(samples, config.run.seed)
    sources = order_of(data, config, checked)
    return sources, reader_of(sources, folders, config)


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

"""Whether a run can start: sizes that divide, data that are there. Before any process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nlscale.checkpoint import FOLDER
from nlscale.cluster.life.place import place
from nlscale.config.curriculum import TrainingStage, curriculum, lengths
from nlscale.config.data_sources import mixtures_of
from nlscale.config.vocabulary import Config
from nlscale.data import BatchReader, Samples, TokenShards
from nlscale.data.folders import Folder, open_folders
from nlscale.data.history import Ordered, identity, is_mixed, samples_beyond
from nlscale.data.order import seed_of_cut
from nlscale.data.reader import MixtureReader
from nlscale.data.tasks.table import task_of_index
from nlscale.errors import UserError
from nlscale.evaluate.table import check as check_evaluations
from nlscale.levels.spectrum import Level, levels_of
from nlscale.plan.checks import check_sizes, not_divisible
from nlscale.train.cached import check_cache
from nlscale.train.hooks.table import check as check_hooks
from nlscale.train.mixed import HeldOut, data_from, held_out, order_of, readers_of
from nlscale.train.tiers_here import check_tiers_here


@dataclass
class Prepared:
    """What a checked run stands on."""

    levels: list[Level]
    stages: list[TrainingStage]
    readers: Sequence[BatchReader | MixtureReader]
    """Of each cut of the data, see `nlscale.config.curriculum`."""
    sources: Ordered | None
    """The sources of a mixture, by their place in batches, and their order; None: there is one."""
    folders: list[Folder]
    """The data folders, whose shards are there with their sizes."""
    validation: list[HeldOut]
    """What a validation reads of each folder, at the sequence length with which the run begins."""
    validation_of_end: list[HeldOut] | None
    """At that with which it ends, where that is another."""
    vocabulary: int
    data: dict[str, Any]
    """What identifies the data: the same data in another folder have the same."""
    notes: list[str] = field(default_factory=list)
    """What there is to say of the data, each in a line."""

    def epochs(self, tokens: int) -> dict[str, float]:
        """How often the run, of so many tokens, reads each source of a mixture, or "its data"."""
        if self.sources is None:
            return {"its data": tokens / self.data["train_tokens"]}
        return dict(zip(self.sources.names, self.sources.read()[1], strict=True))


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
    folders, notes, cuts = open_folders(config.data), [], lengths(stages)
    check_hooks(config, len(cuts))
    shards = folders[0].train
    for folder in folders:
        for length in cuts:
            _check_task(config, folder.train, length)
            _check_packed(folder.train, length)
        notes += _packed_together(config, folder.train)
    model.vocabulary = model.vocabulary or shards.vocabulary
    if model.vocabulary < shards.vocabulary:
        raise UserError(
            f"model.vocabulary {model.vocabulary} is smaller than the {shards.vocabulary} "
            f"token ids of {shards.directory}; leave it null"
        )
    if model.vocabulary % config.parallel.tensor:
        raise UserError(not_divisible("model.vocabulary", model.vocabulary, config.parallel.tensor))
    check_tiers_here(config, model.vocabulary, data_parallel)
    in_step = max(stage.global_batch for stage in stages) // data_parallel  # of a rank
    here = min(data_parallel, place().local_world)
    data = identity(folders, config, mixed=bool(mixtures_of(config.data)))
    # what was read before decides whether a mixture is enough: `go_on` checks it then
    sources, readers = _order_and_readers(config, folders, data, checked=not _may_go_on(config))
    splits = [split for folder in folders for split in (folder.train, folder.held_out)]
    end = stages[-1].sequence_length
    return Prepared(
        levels=levels,
        stages=stages,
        readers=readers,
        sources=sources,
        folders=folders,
        validation=held_out(folders, config, stages[0].sequence_length),
        validation_of_end=held_out(folders, config, end) if end != cuts[0] else None,
        vocabulary=model.vocabulary,
        data=data,
        notes=[*notes, *check_cache(splits, here * in_step)],
    )


def _may_go_on(config: Config) -> bool:
    """Whether there may be a checkpoint to go on from, here or elsewhere; none is read."""
    elsewhere = config.resume.start is not None or config.checkpoint.mirror is not None
    return elsewhere or any((Path(config.run.dir) / FOLDER).glob("step-*"))


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
    beyond = 0 if state is None else samples_beyond(config, state["step"], state["samples"])
    sources, readers = _order_and_readers(config, prepared.folders, data, beyond=beyond)
    return replace(prepared, data=data, sources=sources, readers=readers)


def _order_and_readers(
    config: Config,
    folders: list[Folder],
    data: dict[str, Any],
    checked: bool = True,
    beyond: int = 0,
) -> tuple[Ordered | None, Sequence[BatchReader | MixtureReader]]:
    """Of each cut of the data what reads it, and what orders the sources of a mixture."""
    if not is_mixed(data):
        return None, [
            BatchReader(Samples(folders[0].train, length), seed_of_cut(config.run.seed, cut))
            for cut, length in enumerate(lengths(curriculum(config)))
        ]
    sources = order_of(data, config, checked, beyond)
    return sources, readers_of(sources, folders)


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

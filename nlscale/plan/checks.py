"""Whether the numbers of a configuration go together, before anything is started or planned."""

from __future__ import annotations

from dataclasses import fields

from nlscale.config.curriculum import TrainingStage, curriculum
from nlscale.config.in_context import check_contexts
from nlscale.config.units import Interval
from nlscale.config.vocabulary import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    ModelConfig,
    Reduction,
    Sharding,
    head_dim,
    kv_heads,
    mixer_label,
)
from nlscale.errors import UserError
from nlscale.levels.ring_pieces import check_tiers
from nlscale.model.pattern import block_kinds, document_chunk
from nlscale.model.sizes import level_hidden
from nlscale.model.stages import stage_blocks
from nlscale.optim.table import rule


def check_sizes(config: Config, ranks: int) -> int:
    """Check that the numbers of the configuration go together, for that many ranks, without data.

    Returns:
        The data-parallel ranks, those that share a batch.

    Raises:
        UserError: one line with the numbers and a fix.
    """
    checkpoint_interval(config.checkpoint)
    _divides(config)
    parallel, stages = config.parallel, curriculum(config)
    model_ranks = parallel.tensor * parallel.pipeline
    if ranks % model_ranks:
        raise UserError(
            f"{ranks} ranks do not divide by parallel.tensor {parallel.tensor} x "
            f"parallel.pipeline {parallel.pipeline}; use a multiple of {model_ranks} ranks"
        )
    data_parallel = ranks // model_ranks
    for index, stage in enumerate(stages, 1):
        try:
            _check_stage(config, stage, data_parallel)
        except UserError as error:
            if len(stages) == 1:
                raise
            raise UserError(f"stage {index} of the run ({stage}): {error}") from None
    return data_parallel


def _check_stage(config: Config, stage: TrainingStage, data_parallel: int) -> None:
    """The batch of a stage is shared out evenly, and so are its sequences."""
    micro_batch, batch = config.train.micro_batch, stage.global_batch
    per_pass = micro_batch * data_parallel
    if batch % per_pass:
        below, above = batch // per_pass * per_pass, -(-batch // per_pass)
        near = " or ".join(str(n) for n in (below, above * per_pass) if n)
        raise UserError(
            f"train.global_batch {batch} is not divisible by train.micro_batch "
            f"{micro_batch} x {data_parallel} data-parallel ranks; use {near}"
        )
    _enough_micro_batches(config, batch, data_parallel)
    tensor, length = config.parallel.tensor, stage.sequence_length
    if config.parallel.sequence and length % tensor:
        raise UserError(not_divisible("data.sequence_length", length, tensor))


def _enough_micro_batches(config: Config, batch: int, data_parallel: int) -> None:
    """The interleaved schedule passes micro batches in groups of the pipeline's size."""
    parallel, train = config.parallel, config.train
    micro_batches = batch // (train.micro_batch * data_parallel)
    if parallel.virtual_stages == 1 or micro_batches % parallel.pipeline == 0:
        return
    group = train.micro_batch * data_parallel * parallel.pipeline
    below, above = batch // group * group, -(-batch // group) * group
    near = " or ".join(str(n) for n in sorted({below, above} - {0}))
    raise UserError(
        f"train.global_batch {batch} makes {micro_batches} micro batches a rank; with "
        f"parallel.virtual_stages {parallel.virtual_stages} they must be a multiple of "
        f"parallel.pipeline {parallel.pipeline}; use train.global_batch={near}, or another "
        f"train.micro_batch"
    )


def checkpoint_interval(checkpoint: CheckpointConfig) -> Interval | None:
    """checkpoint.every.

    Raises:
        UserError: it is not an interval.
    """
    if checkpoint.every is None:
        return None
    try:
        return Interval.parse(checkpoint.every)
    except UserError as error:
        raise UserError(f"checkpoint.every: {error}") from None


def _divides(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    if model.attention.head_dim is None and model.d_model % model.heads:
        raise UserError(not_divisible("model.d_model", model.d_model, model.heads, "model.heads"))
    _pattern(model)
    _attention_keys(config)
    for kind in block_kinds(config):
        kind.facts.check(kind.config.model)
    if config.data.document_mask:
        document_chunk(config)
    rule(config.optimizer.rule)
    if model.heads % tensor:
        raise UserError(not_divisible("model.heads", model.heads, tensor))
    if kv_heads(model) % tensor:
        raise UserError(not_divisible("model.attention.kv_heads", kv_heads(model), tensor))
    for kind in block_kinds(config):
        _base_width(kind.config.model)
        for what, number in kind.facts.shared(kind.config.model).items():
            if number % tensor:
                raise UserError(not_divisible(what, number, tensor))
    for index, hidden in enumerate(level_hidden(config)):
        if hidden % tensor:
            raise UserError(not_divisible(f"levels.spectrum.{index}.hidden", hidden, tensor))
    check_contexts(config)
    _sequence_parallel(config)
    _pipeline(config)
    _sharding(config)
    check_tiers(config)


def _pattern(model: ModelConfig) -> None:
    if len(model.pattern) <= model.layers:
        return
    raise UserError(
        f"model.pattern names {len(model.pattern)} mixers, and model.layers is {model.layers}: "
        f"some would have no block; name at most {model.layers}, or have more layers"
    )


def _attention_keys(config: Config) -> None:
    model, kinds = config.model, block_kinds(config)
    reads = any(kind.facts.reads_attention for kind in kinds)
    windowed = any(kind.facts.windowed for kind in kinds)
    for f in fields(AttentionConfig):
        value = getattr(model.attention, f.name)
        needs = windowed if f.name == "window" else reads
        if value != f.default and not needs:
            other = "sliding-window" if f.name == "window" else "attention"
            raise UserError(
                f"model.attention.{f.name} is {value}, which {mixer_label(model)} does not read; "
                f"leave it out, or use model.mixer={other}"
            )


def _base_width(model: ModelConfig) -> None:
    size = head_dim(model)
    base = model.mup_base_width
    if base is None or base % size == 0:
        return
    near = " or ".join(str(n) for n in sorted({base // size * size, -(-base // size) * size} - {0}))
    by, key = f"model.d_model {model.d_model} / model.heads {model.heads}", "model.heads"
    if model.attention.head_dim is not None:
        by = key = "model.attention.head_dim"
    raise UserError(
        f"model.mup_base_width {base} is not a whole number of heads of {size} ({by}), and muP "
        f"carries over between widths of one head size; use {near}, or {key} that keeps the head "
        f"size of the model that was tuned"
    )


def _sequence_parallel(config: Config) -> None:
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise UserError(
            "parallel.sequence splits the sequence over the tensor-parallel ranks; "
            "use parallel.tensor=2 or more, or leave parallel.sequence out"
        )


def _pipeline(config: Config) -> None:
    parallel = config.parallel
    if config.model.tie_embeddings and parallel.pipeline > 1:
        raise UserError(
            f"model.tie_embeddings has the first stage and the last use one matrix, and "
            f"parallel.pipeline {parallel.pipeline} puts them on other ranks; use "
            f"parallel.pipeline=1, with parallel.tensor to split the model, or untie them"
        )
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        raise UserError(
            "parallel.virtual_stages interleaves the stages of pipeline ranks; "
            "use parallel.pipeline=2 or more, or leave it at 1"
        )
    stage_blocks(config, config.model.vocabulary or 0)


def _sharding(config: Config) -> None:
    every_step = config.levels.reduction == Reduction.every_step
    way = config.parallel.shard_optimizer
    if way != Sharding.node and every_step:
        raise UserError(
            f"parallel.shard_optimizer={way.value} sums a window where it is updated, once it is "
            "due, and levels.reduction=every-step sums before; use levels.reduction=deferred, or "
            "parallel.shard_optimizer=node"
        )
    local = [i for i, level in enumerate(config.levels.spectrum) if level.local]
    if way != Sharding.node and local:
        raise UserError(
            f"parallel.shard_optimizer={way.value} spreads what updates a parameter over nodes, "
            f"and levels.spectrum.{local[0]} is local, which each node updates by itself; use "
            f"parallel.shard_optimizer=node, or local=false"
        )


def not_divisible(what: str, number: int, by: int, by_what: str = "parallel.tensor") -> str:
    """What to say of a number that does not divide, with the nearest that do."""
    near = sorted({number // by * by, -(-number // by) * by} - {0})
    return (
        f"{what} {number} is not divisible by {by_what} {by}; "
        f"use {' or '.join(map(str, near))}, or another {by_what}"
    )

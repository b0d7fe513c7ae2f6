"""A few training steps on synthetic tokens: the level engine, and an independent oracle of it."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import world

from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, stage_of
from nlscale.config.vocabulary import Config, DataConfig
from nlscale.levels.spectrum import levels_of, sync_group
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize, join
from nlscale.model.layers import megatron_config
from nlscale.ops.documents import Documents
from nlscale.optim.schedule import learning_rate
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch
from nlscale.train.loop import Trainer

VOCABULARY = 32
SEPARATOR = 31
TINY = [
    "data.dir=none",
    "model.layers=2",
    "model.d_model=32",
    "model.heads=4",
    "model.memory.chunk=8",
    "optimizer.warmup_steps=3",
    # Differences are relative to a parameter's norm, so none may start at zero; and at a learning
    # rate where this tiny model's training amplifies rounding, rounding is what would be compared.
    "model.memory.eta_bias=-1",
    "optimizer.learning_rate=0.001",
    # Adam steps by g / (|g| + eps): a gradient that is nothing but rounding would make a full step.
    "optimizer.eps=1e-5",
    "train.dtype=fp32",
    "train.global_batch=4",
]


def load(overrides: list[str]) -> Config:
    return recipe.load(None, TINY + overrides).config


def sequences(config: Config, step: int) -> list[Batch]:
    """The sequences of a step, one a batch.

    Of `data.sequence_length` where that is given; else of lengths that differ within and between
    steps, which a schedule of one pipeline rank allows.
    """
    out, stage = [], stage_of(curriculum(config), step)
    for i in range(stage.global_batch):
        generator = torch.Generator().manual_seed(1000 * step + i)
        length = 5 + (7 * step + 5 * i) % 13
        if stage.sequence_length != DataConfig.sequence_length:
            length = stage.sequence_length
        tokens = torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)
        documents = None
        if config.data.document_mask:
            tokens[0, length // 3] = tokens[0, -3] = SEPARATOR
            chunk = config.model.memory.chunk
            documents = Documents.of(tokens[:, :-1].numpy(), SEPARATOR, chunk, tokens.device)
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], 1, documents))
    return out


def run_engine(overrides: list[str], spoil: dict[int, int] | None = None) -> dict[str, Any]:
    """Train as configured with the level engine, on this rank of a world.

    Args:
        overrides: on top of `TINY`.
        spoil: at step s, rank r gets a NaN into its gradient.

    Returns:
        losses, the full parameters at the end, a hash of the parameters after each step, the
        updates and reductions of each level, and the `fills` of its windows; `started` at each
        step, the reductions across nodes that this rank began while its backward pass went on, and
        all of them; `bytes_by_step`, as the trainer counts them, and `sent`, those that its wire
        counted on all ranks of a node.
    """
    config = load(overrides)
    with process_groups(config) as layout:
        levels = levels_of(config)
        trainer = Trainer.build(config, layout, levels, VOCABULARY)
        losses, hashes, admitted, started, sent = [], [], [], [], []
        begun = count_starts(trainer)
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            spoils = spoil is not None and spoil.get(step) == layout.rank
            with spoiled_gradient(trainer.stages[-1]) if spoils else nullcontext():
                verdict, _ = trainer.take_step(mine)
            losses.append(verdict.loss)
            admitted.append(verdict.admitted)
            hashes.append(_hash(trainer))
            started.append(tuple(begun))
            sent.append(trainer.counters.bytes_sent)
        of_ranks: list[Any] = [None] * layout.world
        torch.distributed.all_gather_object(of_ranks, trainer.optimizer.wire.bytes)
        return {
            "losses": losses,
            "admitted": admitted,
            "hashes": hashes,
            "parameters": whole_parameters(trainer),
            "started": started,
            "bytes_by_step": [now - before for now, before in zip(sent, [0, *sent], strict=False)],
            "sent": sum(of_ranks) / layout.all_nodes,
            "counts": [trainer.optimizer.counts(level.index) for level in levels],
            "fills": [
                trainer.optimizer.window_fill(level.index, config.train.steps, lambda n: 100 * n)
                for level in levels
            ],
        }


def count_starts(trainer: Trainer) -> list[int]:
    """How many reductions across nodes began in the last backward pass, and in all of the step."""
    counts = [0, 0]
    wire, optimizer = trainer.optimizer.wire, trainer.optimizer
    start, start_step, finish = wire.start, optimizer.start_step, optimizer.finish_backward
    over = False

    def begin_step(step: int) -> None:
        nonlocal over
        counts[:], over = [0, 0], False
        start_step(step)

    def end_backward() -> None:
        nonlocal over
        over = True
        finish()

    def count(*args: Any, **kwargs: Any) -> None:
        counts[0] += not over
        counts[1] += 1
        start(*args, **kwargs)

    wire.start, optimizer.start_step = count, begin_step  # type: ignore[method-assign]
    optimizer.finish_backward = end_backward  # type: ignore[method-assign]
    return counts


@contextmanager
def spoiled_gradient(model: torch.nn.Module) -> Iterator[None]:
    """One element of one gradient of this rank is NaN."""
    last = list(model.parameters())[-1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = float("nan")
        return gradient

    handle = last.register_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


Makes = Callable[[str, torch.nn.Parameter, int, int], Any]


def run_oracle(
    overrides: list[str], skip: frozenset[int] = frozenset(), make: Makes | None = None
) -> dict[str, Any]:
    """The same training written down plainly: one process, whole tensors, torch's AdamW.

    A dictionary of summed gradients a sync group; nothing of the engine is used. `make` makes the
    optimizer of a parameter, given its name, itself, its level and its depth.
    """
    config = load(overrides)
    with process_groups(config):
        model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(model, config.run.seed, 0, 1)
        named = dict(model.named_parameters())
        levels = levels_of(config)
        group_of = {}
        for name in named:
            level, depth = model.level_and_depth(name)
            group_of[name] = sync_group(
                levels[level], depth, config.model.layers, config.levels.stagger
            )
        adam = {
            name: make(name, p, *model.level_and_depth(name)) if make else _adam(config, name, p)
            for name, p in named.items()
        }
        sums = {name: torch.zeros_like(p) for name, p in named.items()}
        tokens = dict.fromkeys(set(group_of.values()), 0)
        losses = []
        for step in range(1, config.train.steps + 1):
            model.zero_grad()
            batch = sequences(config, step)
            loss = sum(_counted(model(b.tokens, b.targets, b.documents), b) for b in batch)
            count = sum(b.counted_tokens for b in batch)
            loss.backward()
            losses.append(loss.item() / count if count else math.nan)
            if step not in skip:
                for name, p in named.items():
                    sums[name] += p.grad
                for group in tokens:
                    tokens[group] += count
            due = [g for g in tokens if (g.due(step) or step == config.train.steps) and tokens[g]]
            _step(config, levels, due, group_of, named, sums, tokens, adam, step)
        return {
            "losses": losses,
            "parameters": {n: p.detach().clone() for n, p in named.items()},
        }


def _counted(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the losses [sequence, 1] of targets that count, from which the others are left out."""
    return losses.T[batch.mask.counts].sum() if batch.mask is not None else losses.sum()


def _step(config, levels, due, group_of, named, sums, tokens, adam, step) -> None:
    means = {name: sums[name] / tokens[group_of[name]] for name in named if group_of[name] in due}
    for name, mean in means.items():
        level = group_of[name].level
        together = [
            m
            for other, m in means.items()
            if config.optimizer.clip_scope.value == "joint" or group_of[other].level == level
        ]
        norm = torch.stack([m.norm() for m in together]).norm()
        clip = config.optimizer.clip
        factor = min(1.0, clip / (norm.item() + 1e-6)) if clip > 0 else 1.0
        rate = learning_rate(config.optimizer, step, config.train.steps)
        made = len(adam[name].state) and int(adam[name].state[named[name]]["step"])
        warm = min(1.0, (made + 1) / (config.optimizer.warmup_updates + 1))
        scale = levels[level].scale_at(group_of[name].period_at(step))
        adam[name].param_groups[0]["lr"] = rate * scale * warm
        named[name].grad = mean * factor
        adam[name].step()
        sums[name].zero_()
    for group in due:
        tokens[group] = 0


def _adam(config: Config, name: str, p: torch.nn.Parameter) -> torch.optim.AdamW:
    o = config.optimizer
    decay = o.weight_decay if p.dim() > 1 and "norm" not in name else 0.0
    return torch.optim.AdamW(
        [p], lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=decay, foreach=False
    )


def whole_parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The full tensors of the whole model, on every rank, in the order of their names."""
    mine = {
        name: (
            trainer.layout.tensor_rank,
            p.detach().clone(),
            SimpleNamespace(
                tensor_model_parallel=p.tensor_model_parallel,
                partition_dim=p.partition_dim,
                sections=p.sections,
            ),
        )
        for name, p in trainer.named_parameters().items()
    }
    everyones: list[Any] = [None] * trainer.layout.world
    torch.distributed.all_gather_object(everyones, world.dumps(mine))
    parts: dict[str, dict[int, torch.Tensor]] = {}
    tags = {}
    for held in everyones:
        for name, (rank, part, tag) in pickle.loads(held).items():
            parts.setdefault(name, {})[rank] = part
            tags[name] = tag
    return {
        name: join([by_rank[rank] for rank in sorted(by_rank)], tags[name])
        for name, by_rank in sorted(parts.items())
    }


def _hash(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for p in trainer.named_parameters().values():
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max over parameters of |a - b| / |b|, by norm.

    Logits of a mixture start at zero and have no scale of their own: their softmax is compared.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("mixture"):
            x, y = x.softmax(0), y.softmax(0)
        worst = max(worst, ((x - y).norm() / (y.norm() + 1e-12)).item())
    return worst

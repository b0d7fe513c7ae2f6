"""What the state of a run is, in a form that no layout of ranks shows in.

Tensors, each whole and under its parameter's own name, whatever rank holds which range of it:

    weights/NAME                   fp32, what the optimizer updates
    exp_avg/NAME, exp_avg_sq/NAME  fp32, Adam's moments; absent before the first update. Of another
                                   rule what that keeps (`nlscale.optim.table`)
    window/NAME                    fp32, sum of gradients of an unfinished window, over all nodes
    window/NAME@3                  the same of node 3 alone (checkpoint.pending=exact)
    error/NAME                     fp32, errors of rounding of a level that crosses as integers, yet
                                   to be sent: the sum over nodes and owners
    error/NAME@3                   those of node 3 alone (checkpoint.pending=exact)
    owner_error/NAME               those of the owners (checkpoint.pending=exact)
    outer_weights/NAME             fp32, as after the last outer step, where updates were made since
    outer_momentum/NAME            fp32; absent before the first outer step
    level_copy_2/NAME              fp32, the copy of level 2 of the spectrum (`model.cms: nested`);
                                   absent before the first update
    KIND/NAME                      fp32, what a hook keeps of each parameter (`nlscale.train.hooks`)

Of a local level `weights/NAME` are those of the last outer step, which all nodes share, and each
node stores its own of the rest: `exp_avg/NAME@3`, `window/NAME@3`, and `local_weights/NAME@3` where
updates were made since.

And `state.json`: counters, progress of every sync group, configuration, data and versions. A rule's
step count is the updates of its group. No random numbers are drawn in training (weights come from
the seed and their names, samples from the seed and their numbers), so no generator has a state.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from nlscale.checkpoint.flat import Flat, boxes, cut
from nlscale.checkpoint.slabs import HostSlabs
from nlscale.checkpoint.store.pieces import Piece
from nlscale.config import recipe
from nlscale.config.vocabulary import Pending
from nlscale.levels.canonical import keep_sums_once, sum_windows
from nlscale.levels.progress import Progress
from nlscale.levels.spectrum import SyncGroup
from nlscale.levels.state import OwedShard, Shard, WindowShard
from nlscale.parallel.layout import Layout
from nlscale.step.trainer import Trainer

ERROR, OWNER_ERROR, LEVEL_COPY = "error", "owner_error", "level_copy_"
"""First parts of names."""
_PACKAGES = ("nlscale", "torch", "megatron-core")


@dataclass(frozen=True)
class Own:
    """A range of what each node has for itself."""

    flat: Flat
    """Under the name without a node."""
    group: SyncGroup
    window: bool = False
    """Whether it is a sum of gradients."""

    def of_node(self, node: int) -> Flat:
        """The range under the name that a node's has in a checkpoint."""
        return replace(self.flat, name=f"{self.flat.name}@{node}")


@dataclass(frozen=True)
class Held:
    """What a rank holds of the state."""

    everywhere: list[Flat]
    """What the ranks of the same shard hold on every node alike, in the same order."""
    here: list[Flat]
    """What this rank alone holds."""
    own: list[Own]
    """Likewise, of local levels: under the same names other nodes hold others."""

    def dealt(self, layout: Layout) -> list[Flat]:
        """What this rank writes or reads of it: of what all nodes hold, an equal part of bytes."""
        everywhere = cut(self.everywhere, layout.nodes, layout.node_rank)
        return everywhere + self.here + [own.of_node(layout.node_rank) for own in self.own]

    def pieces(self, layout: Layout) -> list[Piece]:
        """The same, as boxes of the whole tensors."""
        return [piece for flat in self.dealt(layout) for piece in boxes(flat, layout)]


def copy_of_state(trainer: Trainer, slabs: HostSlabs) -> list[Piece]:
    """What this rank writes of the state, copied to host memory.

    With `checkpoint.pending=canonical` the pending windows are brought into canonical form first,
    in the running trainer too: the run that goes on and the run that resumes are the same.

    Args:
        trainer: the same on every rank.
        slabs: where the copy goes; it holds until the next one.
    """
    layout, canonical = trainer.layout, is_canonical(trainer)
    if canonical:
        sum_windows(trainer.optimizer)
    held = held_of(trainer, canonical, lambda shard, updates: shard.state() if updates else {})
    if layout.tensor_rank > 0:  # what all tensor ranks hold whole is written by the first
        own = [own for own in held.own if own.flat.parameter.tensor_model_parallel]
        held = Held(_split(held.everywhere), _split(held.here), own)
    copied = slabs.copy(held.dealt(layout))
    if canonical:
        keep_sums_once(trainer.optimizer)
    return [piece for part in copied for piece in boxes(part, layout)]


def held_of(
    trainer: Trainer, canonical: bool, kept: Callable[[Shard, int], dict[str, Tensor]]
) -> Held:
    """What this rank holds of the state.

    Args:
        trainer: with the progress of its sync groups.
        canonical: whether windows are sums over the nodes.
        kept: makes of a shard and its group's updates what the rule keeps; nothing where there was
            none, as an update that found its window empty has left zeros.
    """
    layout, progress = trainer.layout, trainer.optimizer.progress
    held = Held([], [], [])
    alike = held.everywhere if trainer.optimizer.alike_on_nodes else held.here
    for shard in trainer.shards():
        shared, own = _of_shard(shard, progress[shard.group], kept)
        alike += [flat(f"{kind}/{shard.name}", shard, tensor) for kind, tensor in shared.items()]
        held.own.extend(
            Own(flat(f"{kind}/{shard.name}", shard, tensor), shard.group)
            for kind, tensor in own.items()
        )
    for kind, of_shards in trainer.kept.items():
        for shard in trainer.shards():
            one = flat(f"{kind}/{shard.name}", shard, of_shards[shard.weights])
            if shard.local:
                held.own.append(Own(one, shard.group))
            else:
                alike.append(one)
    windows = held.everywhere if canonical else held.here
    node = "" if canonical else f"@{layout.node_rank}"
    for mine in trainer.windows():
        if not progress[mine.group].tokens:
            continue
        if mine.local:
            summed = flat(f"window/{mine.name}", mine, mine.window)
            held.own.append(Own(summed, mine.group, window=True))
        else:
            windows.append(flat(f"window/{mine.name}{node}", mine, mine.window))
    for owed in trainer.owed():
        if not owed.of_owner:
            windows.append(flat(f"{ERROR}/{owed.name}{node}", owed, owed.owed))
        elif not canonical:  # else the nodes' errors hold them
            held.here.append(flat(f"{OWNER_ERROR}/{owed.name}", owed, owed.owed))
    return held


def _of_shard(
    shard: Shard, progress: Progress, kept: Callable[[Shard, int], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is held of a shard by the class of tensor: what nodes share, and what each has."""
    rule = kept(shard, progress.state_updates)
    shared, outer = {"weights": shard.weights}, shard.outer
    shared |= {f"{LEVEL_COPY}{level}": copy for level, copy in shard.copies.items()}
    if outer is None:
        return {**shared, **rule}, {}
    before, momentum = outer.before[shard.weights], outer.momentum[shard.weights]
    if progress.outer_steps:
        shared["outer_momentum"] = momentum
    if not shard.local:
        shared |= {"outer_weights": before} if progress.outer_updates else {}
        return {**shared, **rule}, {}
    if not progress.outer_updates:
        return shared, rule
    return {**shared, "weights": before}, {"local_weights": shard.weights, **rule}


def _split(flats: list[Flat]) -> list[Flat]:
    return [flat for flat in flats if flat.parameter.tensor_model_parallel]


def trainer_state(trainer: Trainer, data: dict[str, Any], wandb_id: str | None) -> dict[str, Any]:
    """What `state.json` holds.

    Args:
        trainer: the same on every rank.
        data: what identifies the data, to be compared on resuming.
        wandb_id: the id under which the run is tracked, if it is.
    """
    layout = trainer.layout
    return {
        **asdict(trainer.counters),
        "levels": [
            {
                "level": g.level,
                "phase": g.phase,
                "period": g.period,
                "outer_phase": g.outer_phase,
                **progress.to_plain(),
            }
            for g, progress in trainer.optimizer.progress.items()
        ],
        "gradient_noise": [asdict(own.noise) for own in trainer.optimizer.progress.values()],
        "config": recipe.to_plain(trainer.config),
        "data": data,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "layout": layout_of(layout),
        "pending": trainer.config.checkpoint.pending.value,
        "wandb_id": wandb_id,
        **({"kept": [*trainer.kept]} if trainer.kept else {}),
        **({"noted": noted} if (noted := _noted(trainer)) else {}),
    }


def _noted(trainer: Trainer) -> dict[str, Any]:
    """What hooks have noted, of those that have; as it is now, as it is written later."""
    return {name: deepcopy(of_hook) for name, of_hook in trainer.noted.items() if of_hook}


def flat(name: str, shard: Shard | WindowShard | OwedShard, tensor: Tensor) -> Flat:
    """A tensor of a shard's range."""
    return Flat(name, shard.parameter, shard.start, tensor.detach())


def is_canonical(trainer: Trainer) -> bool:
    """Whether a checkpoint holds sums of windows over all nodes."""
    return trainer.config.checkpoint.pending == Pending.canonical


def layout_of(layout: Layout) -> dict[str, int]:
    """What is stored of a layout."""
    return {
        "ranks": layout.world,
        "tensor": layout.tensor_size,
        "pipeline": layout.pipeline_size,
        "nodes": layout.nodes,
    }

"""Putting a freshly built trainer where a checkpoint's was, or giving it a model's weights.

A rank reads what updates its parameters and nothing twice: of what every node holds each reads an
equal part, and gets the others' from them. Where the files come over the network they cross it once
instead of once a node. The parameters themselves follow from what updates them, by the same
gathering inside the node as after an update.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.checkpoint.export.weights import read_weights
from nlscale.checkpoint.flat import Flat, cut
from nlscale.checkpoint.own import group_of, read_own
from nlscale.checkpoint.state import (
    ERROR,
    OWNER_ERROR,
    Held,
    flat,
    held_of,
    is_canonical,
    layout_of,
)
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config.parts import parts_of, parts_of_saved
from nlscale.config.vocabulary import Pending
from nlscale.errors import UserError
from nlscale.levels.canonical import keep_sums_once
from nlscale.levels.progress import Progress
from nlscale.levels.state import Shard
from nlscale.model.init import full_shape
from nlscale.parallel.layout import Layout
from nlscale.step.trainer import Counters, Trainer

_SPREAD_AT_ONCE = 2**26
"""Elements that go to the other nodes at a time."""


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a freshly built trainer where the checkpoint's was, on whatever layout.

    Raises:
        UserError: the sync groups or their parts are others, or the windows are another layout's
            own.
        CheckpointError: the checkpoint does not hold what is asked of it.
    """
    state, layout, canonical = checkpoint.state, trainer.layout, is_canonical(trainer)
    _restore_progress(trainer, state)
    _refuse_other_parts(trainer, state)
    if state["pending"] == Pending.exact.value and state["layout"] != layout_of(layout):
        raise UserError(
            f"{checkpoint.path} holds the windows of its own layout ({_say(state['layout'])}) and "
            f"this is {_say(layout_of(layout))}: checkpoint.pending=exact resumes on the same "
            f"layout only"
        )
    if state["pending"] != trainer.config.checkpoint.pending.value:
        canonical = state["pending"] == Pending.canonical.value
    _make_room_for_errors(trainer, checkpoint)
    trainer.noted = deepcopy(state.get("noted", {}))
    trainer.kept = {
        kind: {shard.weights: torch.zeros_like(shard.weights) for shard in trainer.shards()}
        for kind in state.get("kept", [])
    }
    held = _without_new_errors(held_of(trainer, canonical, _kept(trainer, checkpoint)), checkpoint)
    if held.own and state["layout"]["nodes"] != layout.nodes:
        read_own(checkpoint, held.own, layout)
        held = Held(held.everywhere, held.here, [])
    checkpoint.read(held.pieces(layout))
    _spread(held.everywhere, layout)
    if canonical:
        keep_sums_once(trainer.optimizer)
    trainer.optimizer.gather_parameters()
    names = Counters.__dataclass_fields__
    trainer.counters = Counters(**{name: _all_counted(state)[name] for name in names})


def _make_room_for_errors(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Where the checkpoint holds errors of rounding, let windows have them that make none now.

    Those of a level that crosses otherwise than it did, or of a run that goes on on one node; they
    go as they are with the next sums.

    Raises:
        UserError: owners have errors of sums that this run does not send back.
    """
    kinds = {tuple(name.partition("@")[0].split("/", 1)) for name in checkpoint.tensors()}
    names = {p: name for name, p in trainer.named_parameters().items()}
    for window in trainer.optimizer.windows:
        mine = [names[p] for p in window.parameters]
        if any((ERROR, name) in kinds for name in mine):
            owed = window.begin_owed()
            if owed.owned is None and any((OWNER_ERROR, name) in kinds for name in mine):
                raise UserError(
                    f"{checkpoint.path} holds errors of rounding as parallel.shard_optimizer=node "
                    f"and checkpoint.pending=exact make them: go on with that sharding, or from a "
                    f"checkpoint with checkpoint.pending=canonical"
                )


def _without_new_errors(held: Held, checkpoint: Checkpoint) -> Held:
    """Without the errors that the checkpoint does not hold, which begin as zeros."""
    there = checkpoint.tensors()

    def known(flat: Flat) -> bool:
        kind = flat.name.partition("/")[0]
        return kind not in (ERROR, OWNER_ERROR) or flat.name in there

    everywhere, here = ([f for f in each if known(f)] for each in (held.everywhere, held.here))
    return Held(everywhere, here, held.own)


def _kept(trainer: Trainer, checkpoint: Checkpoint) -> Callable[[Shard, int], dict[str, Tensor]]:
    """What is to be read of a shard's optimizer state.

    Of a level whose rule is another than it was, which `resume.allow` has let pass, what both keep;
    the rest begins as zeros.
    """
    saved = checkpoint.state["config"]
    before = [
        level.get("optimizer", {}).get("rule", saved["optimizer"].get("rule", "adamw"))
        for level in saved["levels"]["spectrum"]
    ]
    changed = {i for i, own in enumerate(trainer.optimizer.rules) if own.rule != before[i]}
    there = checkpoint.tensors()

    def kept(shard: Shard, updates: int) -> dict[str, Tensor]:
        state = shard.begin_state(updates) if updates else {}
        if shard.group.level not in changed:
            return state
        end = f"{shard.name}@0" if shard.local else shard.name
        return {kind: x for kind, x in state.items() if f"{kind}/{end}" in there}

    return kept


def start_from_weights(trainer: Trainer, folder: Path) -> None:
    """Give a freshly built trainer the weights of an exported model, on whatever layout.

    Raises:
        UserError: names or shapes are not this model's.
    """
    layout = trainer.layout
    shapes = {
        name: tuple(full_shape(p, layout.tensor_size))
        for name, p in trainer.named_parameters().items()
    }
    everyones: list[Any] = [None] * layout.world
    dist.all_gather_object(everyones, shapes, group=layout.host)
    weights = [flat(f"weights/{shard.name}", shard, shard.weights) for shard in trainer.shards()]
    held = Held(weights, [], []) if trainer.optimizer.alike_on_nodes else Held([], weights, [])
    read_weights(folder, held.pieces(layout), {k: v for part in everyones for k, v in part.items()})
    _spread(held.everywhere, layout)
    trainer.optimizer.gather_parameters()


def _spread(flats: list[Flat], layout: Layout) -> None:
    """Give every node the parts that the others have read (`Held.dealt`)."""
    if layout.across_nodes is None:
        return
    for node in range(layout.nodes):
        for part in cut(flats, layout.nodes, node):
            for piece in part.data.split(_SPREAD_AT_ONCE):
                there = piece.to(layout.device)  # itself, but where it lies in host memory
                dist.broadcast(there, group=layout.across_nodes, group_src=node)
                if there is not piece:
                    piece.copy_(there)


def _restore_progress(trainer: Trainer, state: dict[str, Any]) -> None:
    saved = {group_of(entry): entry for entry in state["levels"]}
    progress, levels = trainer.optimizer.progress, trainer.levels
    before = state["config"]["levels"]["spectrum"]
    for level, was in zip(levels, before, strict=False):
        if level.local != was.get("local", False):
            raise UserError(
                f"levels.spectrum.{level.index}.local is {str(level.local).lower()}, and the "
                f"checkpoint's was {str(not level.local).lower()}: what nodes have for themselves "
                f"does not become another's; keep it, or begin with exported weights (run.weights)"
            )
    if saved.keys() != progress.keys():
        raise UserError(
            "the checkpoint's levels, periods or phases are others than this configuration's, and "
            "its windows belong to them: keep levels, model.layers and the tokens of a step"
        )
    noise = state.get("gradient_noise", [None] * len(saved))
    for (group, entry), own in zip(saved.items(), noise, strict=True):
        progress[group] = Progress.of_plain(entry, own)
        if levels[group.level].outer is None:
            progress[group].outer_updates = progress[group].outer_steps = 0
        if levels[group.level].local:
            progress[group].move_to(trainer.layout.nodes)


def _refuse_other_parts(trainer: Trainer, state: dict[str, Any]) -> None:
    if parts_of_saved(state["config"]) != parts_of(trainer.config):
        raise UserError(
            "parts of the model are at other levels than in the checkpoint, whose windows and "
            "counts of updates belong to them: keep the parts of levels"
        )


def _all_counted(entry: dict[str, Any]) -> dict[str, Any]:
    """What was saved; of versions without masks, for which every token counted, with that said."""
    return {"counted_tokens": entry["tokens"], **entry}


def _say(layout: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in layout.items())

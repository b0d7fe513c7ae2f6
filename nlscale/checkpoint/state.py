"""What the state of a run is, in a form that no layout of ranks shows in.

Tensors, each whole and under its parameter's own name, whatever rank holds which range of it:

    weights/NAME                   fp32, what the optimizer updates
    exp_avg/NAME, exp_avg_sq/NAME  fp32, Adam's moments; absent before the first update. Of another
                                   rule what that keeps (`nlscale.optim.table`)
    window/NAME                    fp32, sum of gradients of an unfinished window, over all nodes
    window/NAME@3                  the same of node 3 alone (checkpoint.pending=exact)

and `state.json`: counters, progress of every sync group, configuration, data and versions. A rule's
step count is the updates of its group. No random numbers are drawn in training (weights come from
the seed and their names, samples from the seed and their numbers), so no generator has a state.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.checkpoint.export.weights import read_weights
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config import recipe
from nlscale.config.vocabulary import Pending, Reduction
from nlscale.errors import UserError
from nlscale.levels.engine import Progress
from nlscale.levels.spectrum import SyncGroup
from nlscale.levels.state import Shard, shards
from nlscale.model.init import full_shape
from nlscale.parallel.layout import Layout
from nlscale.step.trainer import Counters, Trainer

_PACKAGES = ("nlscale", "torch", "megatron-core")


def trainer_pieces(trainer: Trainer) -> list[Piece]:
    """What this rank writes of the state: views of the live tensors.

    With `checkpoint.pending=canonical` the pending windows are brought into canonical form first,
    in the running trainer too: the run that goes on and the run that resumes are the same.
    """
    layout, canonical = trainer.layout, _is_canonical(trainer)
    if canonical:
        trainer.optimizer.settle_windows()
    held = shards(trainer.optimizer, trainer.named_parameters())
    pieces = []
    for index, shard in enumerate(held):
        # what all tensor ranks hold whole is written by the first, what all nodes hold by one
        if layout.tensor_rank > 0 and not shard.parameter.tensor_model_parallel:
            continue
        if index % layout.nodes == layout.node_rank:
            # An update that found its window empty has left zeros.
            kept = shard.state() if trainer.optimizer.progress[shard.group].updates else {}
            for kind, tensor in {"weights": shard.weights, **kept}.items():
                pieces += _boxes(f"{kind}/{shard.name}", shard, layout, tensor)
        if _pending(trainer, shard.group) and (layout.node_rank == 0 or not canonical):
            pieces += _boxes(_window_name(shard, layout, canonical), shard, layout, shard.window)
    return pieces


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
            {"level": g.level, "phase": g.phase, "period": g.period, **asdict(progress)}
            for g, progress in trainer.optimizer.progress.items()
        ],
        "config": recipe.to_plain(trainer.config),
        "data": data,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "layout": _layout_of(layout),
        "pending": trainer.config.checkpoint.pending.value,
        "wandb_id": wandb_id,
    }


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a freshly built trainer where the checkpoint's was, on whatever layout.

    Raises:
        UserError: the sync groups are others, or the windows are another layout's own.
        CheckpointError: the checkpoint does not hold what is asked of it.
    """
    state, layout, canonical = checkpoint.state, trainer.layout, _is_canonical(trainer)
    _restore_progress(trainer, state)
    if state["pending"] == Pending.exact.value and state["layout"] != _layout_of(layout):
        raise UserError(
            f"{checkpoint.path} holds the windows of its own layout ({_say(state['layout'])}) and "
            f"this is {_say(_layout_of(layout))}: checkpoint.pending=exact resumes on the same "
            f"layout only"
        )
    if state["pending"] != trainer.config.checkpoint.pending.value:
        canonical = state["pending"] == Pending.canonical.value
    held = shards(trainer.optimizer, trainer.named_parameters())
    pieces = _weights_pieces(trainer)
    for shard in held:
        progress = trainer.optimizer.progress[shard.group]
        if progress.updates:
            for kind, tensor in shard.begin_state(progress.updates).items():
                pieces += _boxes(f"{kind}/{shard.name}", shard, layout, tensor)
        everywhere = not canonical or trainer.config.levels.reduction == Reduction.every_step
        if _pending(trainer, shard.group) and (layout.node_rank == 0 or everywhere):
            pieces += _boxes(_window_name(shard, layout, canonical), shard, layout, shard.window)
    checkpoint.read(pieces)
    _adopt_weights(trainer, held)
    names = Counters.__dataclass_fields__
    trainer.counters = Counters(**{name: state[name] for name in names})


def start_from_weights(trainer: Trainer, folder: Path) -> None:
    """Give a freshly built trainer the weights of an exported model, on whatever layout.

    Raises:
        UserError: names or shapes are not this model's.
    """
    shapes = {
        name: tuple(full_shape(p, trainer.layout.tensor_size))
        for name, p in trainer.named_parameters().items()
    }
    everyones: list[Any] = [None] * trainer.layout.world
    dist.all_gather_object(everyones, shapes, group=trainer.layout.host)
    read_weights(
        folder, _weights_pieces(trainer), {k: v for part in everyones for k, v in part.items()}
    )
    _adopt_weights(trainer, shards(trainer.optimizer, trainer.named_parameters()))


def _weights_pieces(trainer: Trainer) -> list[Piece]:
    """Where weights are read to: the gradient buffers, fp32 and empty between steps."""
    parameters: dict[str, Any] = trainer.named_parameters()
    return [
        piece
        for name, p in parameters.items()
        for piece in pieces_of(f"weights/{name}", p, trainer.layout, 0, p.main_grad.view(-1))
    ]


def _adopt_weights(trainer: Trainer, held: list[Shard]) -> None:
    """Set parameters and what updates them from the gradient buffers, and empty those."""
    parameters: dict[str, Any] = trainer.named_parameters()
    with torch.no_grad():
        for shard in held:
            whole = shard.parameter.main_grad.view(-1)
            shard.weights.copy_(whole[shard.start : shard.start + shard.weights.numel()])
        for p in parameters.values():
            p.copy_(p.main_grad)
    for window in trainer.optimizer.windows:
        window.clear()


def pieces_of(name: str, parameter: Any, layout: Layout, start: int, flat: Tensor) -> list[Piece]:
    """A range of a parameter's flattened local part as boxes of the whole tensor.

    Args:
        name: of the tensor.
        parameter: tagged with how it is split over the tensor-parallel group.
        layout: this rank's place.
        start: where the range begins in the local part.
        flat: [length], contiguous; the boxes are views of it.
    """
    shape = tuple(full_shape(parameter, layout.tensor_size))
    pieces = []
    for offsets, sizes, begin in _flat_boxes(tuple(parameter.shape), start, start + flat.numel()):
        box = flat[begin - start : begin - start + math.prod(sizes)].view(sizes)
        if not parameter.tensor_model_parallel:
            pieces.append(Piece(name, shape, offsets, box))
            continue
        dim = parameter.partition_dim
        first, last = offsets[dim], offsets[dim] + sizes[dim]
        local = whole = 0  # where a section begins, here and in the whole tensor
        for section in parameter.sections or (shape[dim],):
            share = section // layout.tensor_size
            low, high = max(first, local), min(last, local + share)
            if low < high:
                place = list(offsets)
                place[dim] = whole + layout.tensor_rank * share + low - local
                part = box.narrow(dim, low - first, high - low)
                pieces.append(Piece(name, shape, tuple(place), part))
            local, whole = local + share, whole + section
    return pieces


Box = tuple[tuple[int, ...], tuple[int, ...], int]
"""Offsets and sizes of a box, and where it begins in the flattened array."""


def _flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes, in order, that make up the range start..stop of a flattened array."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    row = math.prod(shape[1:])
    first, rest = divmod(start, row)
    last = stop // row
    if rest or first == last:  # a row begun, or a range within one
        end = min(stop, (first + 1) * row)
        for offsets, sizes, begin in _flat_boxes(shape[1:], rest, end - first * row):
            yield (first, *offsets), (1, *sizes), begin + first * row
        yield from _flat_boxes(shape, end, stop)
        return
    yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), start
    yield from _flat_boxes(shape, last * row, stop)


def _boxes(name: str, shard: Shard, layout: Layout, tensor: Tensor) -> list[Piece]:
    return pieces_of(name, shard.parameter, layout, shard.start, tensor.detach())


def _window_name(shard: Shard, layout: Layout, canonical: bool) -> str:
    return f"window/{shard.name}" + ("" if canonical else f"@{layout.node_rank}")


def _pending(trainer: Trainer, group: SyncGroup) -> bool:
    return trainer.optimizer.progress[group].tokens > 0


def _is_canonical(trainer: Trainer) -> bool:
    return trainer.config.checkpoint.pending == Pending.canonical


def _restore_progress(trainer: Trainer, state: dict[str, Any]) -> None:
    saved = {
        SyncGroup(entry["level"], entry["phase"], entry["period"]): entry
        for entry in state["levels"]
    }
    progress = trainer.optimizer.progress
    if saved.keys() != progress.keys():
        raise UserError(
            "the checkpoint's levels, periods or phases are others than this configuration's, and "
            "its windows belong to them: keep levels, model.layers and the tokens of a step"
        )
    for group, entry in saved.items():
        names = Progress.__dataclass_fields__
        progress[group] = Progress(**{name: entry[name] for name in names})


def _layout_of(layout: Layout) -> dict[str, int]:
    return {
        "ranks": layout.world,
        "tensor": layout.tensor_size,
        "pipeline": layout.pipeline_size,
        "nodes": layout.nodes,
    }


def _say(layout: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in layout.items())

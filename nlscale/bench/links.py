"""What the links between ranks carry, and how much of what crosses the backward pass hides.

Bandwidths are those of all-reduces alone, in the groups that training makes; the overlap is that of
whole training steps, once with `parallel.overlap` and once without.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nlscale.bench.clock import median_seconds, name_of, now
from nlscale.bench.tokens import random_tokens
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.vocabulary import Config, Dtype
from nlscale.errors import TrainingFailed, UserError
from nlscale.levels.spectrum import Level, levels_of
from nlscale.ops.transfer import HostCopy
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan.traffic import cycle_steps
from nlscale.step.trainer import Trainer

_WARM_UP = 3
"""Steps before the first that counts: in its first megatron-core overlaps nothing yet."""
_ONE_NODE = "the data-parallel ranks are all on one node: no gradient crosses between nodes"


def all_reduce_bandwidth(
    config: Config, megabytes: Sequence[float], repeats: int
) -> dict[str, Any]:
    """Time all-reduces in the groups of a run, warm; every rank calls it and gets the same.

    Each kind of group is measured by itself, all groups of that kind at once, as in training: where
    a node has several ranks, they share what leaves it. Gradients are summed in fp32, inside a node
    as between nodes, so fp32 is what is sent; among tensor-parallel ranks, the activations in the
    dtype of the weights.

    Args:
        config: of the run; its `parallel` section makes the groups.
        megabytes: sizes of what is reduced, in 10^6 bytes.
        repeats: all-reduces of each size that are timed.

    Returns:
        `device`, `backend`, `ranks`, `nodes`, `repeats`, and `groups`:
        - `within_node`: the data-parallel ranks of a node
        - `between_nodes`: the ranks that hold the same on each node, one of each
        - `tensor_parallel`: the ranks that share every layer
        - `world`: all ranks

        each null where such a group is of one rank, else `ranks` in a group, `groups_at_once`,
        `dtype` and `sizes`, a list of
        - `bytes`: that each rank has to reduce
        - `seconds`: median on the device's clock, of the slowest rank
        - `bus_bytes_per_second`: 2 (n - 1) / n x bytes / seconds for n ranks, the bus bandwidth of
          nccl-tests: what each rank sends, and receives, in a ring

    Raises:
        UserError: a size is less than one number; or as `process_groups`.
    """
    for size in megabytes:
        if not size * 1e6 >= torch.float32.itemsize:
            raise UserError(f"{size} MB to reduce is less than one number; give 1 or more")
    with process_groups(config) as layout:
        bf16 = config.train.dtype == Dtype.bf16
        activations = torch.bfloat16 if bf16 else torch.float32
        kinds = {
            "within_node": (layout.within_node.dp, torch.float32),
            "between_nodes": (layout.across_nodes, torch.float32),
            "tensor_parallel": (layout.tensor_group, activations),
            "world": (dist.group.WORLD, torch.float32),
        }
        groups = {
            name: _bandwidth(layout, group, dtype, megabytes, repeats)
            for name, (group, dtype) in kinds.items()
        }
        return {
            "device": name_of(layout.device),
            "backend": dist.get_backend(),
            "ranks": layout.world,
            "nodes": layout.all_nodes,
            "repeats": repeats,
            "groups": groups,
        }


def _bandwidth(
    layout: Layout,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    megabytes: Sequence[float],
    repeats: int,
) -> dict[str, Any] | None:
    """Of one kind of group; None where it joins nobody."""
    if group is None or group.size() == 1:
        return None
    ranks, sizes = group.size(), []
    for size in megabytes:
        # zeros stay finite however often they are added up
        values = torch.zeros(int(size * 1e6) // dtype.itemsize, dtype=dtype, device=layout.device)
        seconds = _slowest_seconds(layout, group, values, repeats)
        sent = 2 * (ranks - 1) / ranks * values.nbytes
        sizes.append(
            {
                "bytes": values.nbytes,
                "seconds": seconds,
                "bus_bytes_per_second": sent / seconds,
            }
        )
    return {
        "ranks": ranks,
        "groups_at_once": layout.world // ranks,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": sizes,
    }


def _slowest_seconds(
    layout: Layout, group: dist.ProcessGroup, values: torch.Tensor, repeats: int
) -> float:
    """Of an all-reduce, by the rank of all that takes longest."""
    dist.barrier(group=layout.host)
    mine = median_seconds(layout.device, repeats, lambda _: dist.all_reduce(values, group=group))
    slowest = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=layout.host)
    return slowest.item()


@dataclass(frozen=True)
class _Steps:
    """What all ranks saw of the steps of one way, one number a step."""

    waited: NDArray[np.float64]
    """Seconds that the link was waited for."""
    seconds: NDArray[np.float64]
    """That the slowest rank took."""
    sent: NDArray[np.float64]
    """Bytes by a node to others."""
    losses: NDArray[np.float64]


def overlap_reached(config: Config, steps: int) -> dict[str, Any]:
    """How much of what crosses between nodes is hidden; every rank calls it and gets the same.

    The same steps are taken with `parallel.overlap=false`, then with it, one after the other: two
    copies of a model that fills a GPU would not fit.

    A rank that comes early waits for the others, too. So the wait of a step is that of the rank of
    a group that waits least, which has come last and waits for the link alone; of several groups,
    that of the one that waits longest.

    Args:
        config: of the run, with `model.vocabulary` set.
        steps: that count, whole cycles of the periods.

    Returns:
        - `device`, `dtype`, `ranks`, `nodes` (that hold the same data-parallel group), `steps`,
          `cycle` (steps after which the pattern of updates repeats), `tokens_per_step`
        - `bytes_per_step`: gradients that a node sends to others, mean over the steps
        - `without_overlap` and `with_overlap`: `waited_seconds` of a step for reductions between
          nodes, for each step of a cycle the median over the cycles, and of those the mean;
          `waited_seconds_reducing`, the median over the steps at which a level is reduced;
          `step_seconds`, as `waited_seconds`
        - `share_hidden`: 1 - waited with / waited without overlap; null where nothing was waited
          for without
        - `largest_loss_difference`: between the two ways, over the steps, relative to the loss
        - `because`: why there is none of this, else null

        All from `bytes_per_step` on is null where no gradient crosses between nodes.

    Raises:
        UserError: `model.vocabulary` is not set, or the steps cut a cycle.
        TrainingFailed: a step was not finite.
    """
    if config.model.vocabulary is None:
        raise UserError("the bench reads no data: give model.vocabulary=256, for example")
    stage = largest(config)
    config = at_stage(config, stage)
    levels = levels_of(config)
    cycle = cycle_steps(levels)
    if steps < 1 or steps % cycle:
        raise UserError(
            f"{steps} steps are not whole cycles of the periods, {cycle} steps each; "
            f"give {max(1, -(-steps // cycle)) * cycle}"
        )
    with process_groups(config) as layout:
        result: dict[str, Any] = {
            "device": name_of(layout.device),
            "dtype": config.train.dtype.value,
            "ranks": layout.world,
            "nodes": layout.nodes,
            "steps": steps,
            "cycle": cycle,
            "tokens_per_step": stage.tokens_per_step,
        }
        if layout.across_nodes is None:
            return result | _compared(None, None, cycle) | {"because": _ONE_NODE}
        without = _train(config, layout, levels, steps, overlap=False)
        overlapped = _train(config, layout, levels, steps, overlap=True)
    return result | _compared(without, overlapped, cycle) | {"because": None}


def _train(
    config: Config, layout: Layout, levels: list[Level], steps: int, overlap: bool
) -> _Steps:
    """Train for some steps on this rank's part of random tokens."""
    config = copy.deepcopy(config)
    config.parallel.overlap = overlap
    # at the last step of a run all windows close, and that is none of a cycle
    config.train.steps = max(config.train.steps, _WARM_UP + steps + 1)
    assert config.model.vocabulary is not None
    trainer = Trainer.build(config, layout, levels, config.model.vocabulary)
    batches = random_tokens(config, 1, layout.data_rank, layout.data_size, layout.device)
    for _ in range(_WARM_UP):
        trainer.take_step(batches)
    # A step ends when the verdict on it is read, as in training (nlscale.bench.step).
    ends, sent = [now(layout.device)], [trainer.counters.bytes_sent]
    waited, losses = [], []
    for step in range(1, steps + 1):
        verdict, _ = trainer.take_step(batches)
        ends.append(time.perf_counter())
        if not verdict.admitted:
            raise TrainingFailed(f"step {step} was not finite; nothing was measured")
        waited.append(trainer.waits.link)
        sent.append(trainer.counters.bytes_sent)
        losses.append(verdict.loss)
    del trainer
    _forget()
    of_group = torch.tensor(waited, dtype=torch.float64, device=layout.device)
    dist.all_reduce(of_group, op=dist.ReduceOp.MIN, group=layout.across_nodes)
    of_all = torch.stack([of_group, of_group.new_tensor(np.diff(ends).tolist())])
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
    least, seconds = HostCopy(of_all).read()
    return _Steps(np.array(least), np.array(seconds), np.diff(sent), np.array(losses))


def _forget() -> None:
    """Frees what the model held, or the next one would not fit beside it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compared(without: _Steps | None, overlapped: _Steps | None, cycle: int) -> dict[str, Any]:
    """See `overlap_reached`."""
    keys = ("bytes_per_step", "without_overlap", "with_overlap", "share_hidden")
    if without is None or overlapped is None:
        return dict.fromkeys([*keys, "largest_loss_difference"])
    ways = [_way(without, cycle), _way(overlapped, cycle)]
    before, after = (way["waited_seconds"] for way in ways)
    difference = np.abs(overlapped.losses - without.losses) / np.abs(without.losses)
    return {
        "bytes_per_step": float(without.sent.mean()),
        "without_overlap": ways[0],
        "with_overlap": ways[1],
        "share_hidden": 1 - after / before if before else None,
        "largest_loss_difference": float(difference.max()),
    }


def _way(steps: _Steps, cycle: int) -> dict[str, float]:
    def usual(values: NDArray[np.float64]) -> float:
        return float(np.median(values.reshape(-1, cycle), axis=0).mean())

    return {
        "waited_seconds": usual(steps.waited),
        "waited_seconds_reducing": float(np.median(steps.waited[steps.sent > 0])),
        "step_seconds": usual(steps.seconds),
    }

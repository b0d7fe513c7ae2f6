"""`nlscale bench step`: how fast a whole training step is here, on random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nlscale.bench.clock import now
from nlscale.bench.tokens import random_tokens
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.vocabulary import Config, mixer_label
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters
from nlscale.parallel.layout import process_groups
from nlscale.plan.memory import memory
from nlscale.step.trainer import Trainer

_WARM_UP = 5


def bench_step(
    config: Config, steps: int, look: Callable[[Callable[[], Any]], Any] | None = None
) -> dict[str, Any]:
    """Time whole steps: micro batches, consensus, windows, updates of what is due.

    Args:
        config: of the run.
        steps: to time.
        look: called afterwards with a function that takes one more step.

    Returns:
        `tokens_per_second` at the median step and at the fastest, their seconds, what was run
        (parameters, mixer, dtype, device, ranks, threads), and of the fullest rank
        `planned_memory_bytes` and, on GPUs, `peak_memory_bytes`; null elsewhere. Of a run in stages
        the largest is measured.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read).
    """
    vocabulary = config.model.vocabulary
    if vocabulary is None:
        raise UserError("bench step reads no data: give model.vocabulary=256, for example")
    stage = largest(config)
    config = at_stage(config, stage)
    tokens, levels, peak = stage.tokens_per_step, levels_of(config), None
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels, vocabulary)
        on_gpu = layout.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

        batches = random_tokens(config, 1, layout.data_rank, layout.data_size, layout.device)

        def take_step() -> None:
            trainer.take_step(batches)

        for _ in range(_WARM_UP):
            take_step()
        # As in training, a step ends when the verdict on it is read: while the device is busy with
        # its update, the next one is asked for.
        ends = [now(layout.device)]
        for _ in range(steps):
            take_step()
            ends.append(time.perf_counter())
        seconds = np.diff(ends)
        if on_gpu:
            most = torch.tensor(torch.cuda.max_memory_allocated(), device=layout.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            peak = int(most)
        if look is not None:
            look(take_step)
        in_node = layout.data_size // layout.nodes
        micro_batches = stage.global_batch // (config.train.micro_batch * layout.data_size)
    planned = memory(config, levels, vocabulary, in_node, micro_batches)
    median, fastest = float(np.median(seconds)), float(seconds.min())
    return {
        "tokens_per_second": tokens / median,
        "tokens_per_second_fastest": tokens / fastest,
        "median_step_seconds": median,
        "fastest_step_seconds": fastest,
        "steps": steps,
        "tokens_per_step": tokens,
        "parameters": sum(level_parameters(config, vocabulary)),
        "planned_memory_bytes": max(rank.total for rank in planned),
        "peak_memory_bytes": peak,
        "mixer": mixer_label(config.model),
        "dtype": config.train.dtype.value,
        "device": layout.device.type,
        "ranks": layout.world,
        "threads": torch.get_num_threads(),
    }

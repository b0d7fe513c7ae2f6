"""`nlscale bench step`: how fast a whole training step is here, on random tokens."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from nlscale.bench.tokens import random_tokens
from nlscale.config import Config
from nlscale.errors import UserError
from nlscale.levels import spectrum
from nlscale.model.sizes import level_parameters
from nlscale.parallel.layout import process_groups
from nlscale.plan.memory import memory
from nlscale.trainer import Trainer

_WARM_UP = 5


def bench_step(config: Config, steps: int) -> dict[str, Any]:
    """Time whole steps: micro batches, consensus, windows, updates of what is due.

    Returns:
        `tokens_per_second` at the median step and at the fastest, their seconds, what was run
        (parameters, mixer, dtype, device, threads), and of the fullest rank `planned_memory_bytes`
        and, on GPUs, `peak_memory_bytes`; null elsewhere.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read).
    """
    if config.model.vocabulary is None:
        raise UserError("bench step reads no data: give model.vocabulary=256, for example")
    tokens = config.train.global_batch * config.data.sequence_length
    peak = None
    with process_groups(config) as layout:
        trainer = Trainer.build(
            config, layout, spectrum(config.levels, tokens), config.model.vocabulary
        )
        seconds = []
        for step in range(1, _WARM_UP + steps + 1):
            batches = random_tokens(config, step, layout.data_rank, layout.data_size, layout.device)
            started = _now(layout.device)
            trainer.take_step(batches)
            seconds.append(_now(layout.device) - started)
        seconds = seconds[_WARM_UP:]
        if layout.device.type == "cuda":
            most = torch.tensor(torch.cuda.max_memory_allocated(), device=layout.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            peak = int(most)
        in_node = layout.data_size // layout.nodes
        micro_batches = config.train.global_batch // (config.train.micro_batch * layout.data_size)
    levels = spectrum(config.levels, tokens)
    planned = memory(config, levels, config.model.vocabulary, in_node, micro_batches)
    median = float(np.median(seconds))
    return {
        "tokens_per_second": tokens / median,
        "tokens_per_second_fastest": tokens / min(seconds),
        "median_step_seconds": median,
        "fastest_step_seconds": min(seconds),
        "steps": steps,
        "tokens_per_step": tokens,
        "parameters": sum(level_parameters(config, config.model.vocabulary)),
        "planned_memory_bytes": max(rank.total for rank in planned),
        "peak_memory_bytes": peak,
        "mixer": config.model.mixer.value,
        "dtype": config.train.dtype.value,
        "device": layout.device.type,
        "threads": torch.get_num_threads(),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

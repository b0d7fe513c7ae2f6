"""`nlscale bench step`: how fast a whole training step is here, on random tokens."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from nlscale.bench.sync import random_tokens
from nlscale.config import Config
from nlscale.errors import UserError
from nlscale.levels import spectrum
from nlscale.model.hope import Hope
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.optim.levels import LevelOptimizer
from nlscale.parallel.consensus import agree
from nlscale.parallel.layout import process_groups
from nlscale.parallel.schedule import run_micro_batches

_WARM_UP = 5


def bench_step(config: Config, steps: int) -> dict[str, Any]:
    """Time whole steps: micro batches, consensus, windows, updates of what is due.

    Returns:
        tokens_per_second at the median step, the median and the fastest step in seconds, the
        share of it spent in forward and backward, parameters, threads, dtype, device.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read).
    """
    if config.model.vocabulary is None:
        raise UserError("bench step reads no data: give model.vocabulary=256, for example")
    tokens = config.train.global_batch * config.data.sequence_length
    with process_groups(config) as layout:
        mc = megatron_config(config)
        model = Hope(config, mc, config.model.vocabulary)
        initialize(model, config.run.seed, layout.tensor_rank, layout.tensor_size)
        model.to(layout.device)
        levels = spectrum(config.levels, tokens)
        optimizer = LevelOptimizer(config, levels, model, mc, layout)
        whole, passes = [], []
        for step in range(1, _WARM_UP + steps + 1):
            batches = [
                batch for batch in random_tokens(config, step, layout.data_rank, layout.data_size)
            ]
            started = _now(layout.device)
            optimizer.start_step()
            loss, seen = run_micro_batches(model, batches, optimizer.windows)
            between = _now(layout.device)
            verdict = agree(layout, loss, seen, optimizer.finish_backward(), stop=False)
            if verdict.admitted:
                optimizer.admit(verdict.tokens)
            optimizer.update(step)
            whole.append(_now(layout.device) - started)
            passes.append(between - started)
    median = float(np.median(whole[_WARM_UP:]))
    return {
        "tokens_per_second": tokens / median,
        "median_step_seconds": median,
        "fastest_step_seconds": min(whole[_WARM_UP:]),
        "forward_backward_share": float(np.median(passes[_WARM_UP:])) / median,
        "steps": steps,
        "tokens_per_step": tokens,
        "parameters": model.parameter_count(),
        "mixer": config.model.mixer.value,
        "dtype": config.train.dtype.value,
        "device": layout.device.type,
        "threads": torch.get_num_threads(),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

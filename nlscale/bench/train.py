"""`nlscale bench train`: whole training steps of several mixers, at the same size of model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.clock import ceilings, here, name_of
from nlscale.bench.progress import each
from nlscale.bench.step import bench_step
from nlscale.bench.trace import trace
from nlscale.bench.transformer import bench_transformer
from nlscale.cluster.life.place import place
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config, Dtype, mixer_label
from nlscale.model.flops import flops_per_token

PLAIN = "torch alone"
BESIDE = "attention"
"""The mixer that the speeds of the others are compared with."""


def bench_train(configs: list[Config], steps: int, trace_to: Path | None) -> dict[str, Any]:
    """Time training steps of each configuration by `nlscale.bench.step`, then of plain torch.

    Args:
        configs: which differ in their mixer. Where one of them is attention, and on one rank, a
            Transformer of its size in torch alone is timed beside them, compiled on a GPU. Of a run
            in stages the largest is timed.
        steps: to time.
        trace_to: where to write a profiler trace of the first of them; None: no trace.

    Returns:
        What was measured on, and for each row `tokens_per_second` at the median step, `ratio` of
        that to attention's, `peak_memory_bytes` (GPU) and `planned_memory_bytes`, `parameters`,
        `flops_per_token`, and `mfu`: model FLOPs a second and GPU over the measured rate of a large
        matrix product. `largest_costs` are those that `nlscale.bench.trace.largest_costs` returns.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read).
    """
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    device, ranks = here(), place().world
    stage = largest(configs[0])
    configs = [at_stage(config, stage) for config in configs]
    parts = [(config, mixer_label(config.model)) for config in configs]
    beside = {name: config for config, name in parts}.get(BESIDE)
    if beside is not None and ranks == 1:
        parts.append((beside, PLAIN))
    for config, name in each("train", parts, lambda part: part[1]):
        if name == PLAIN:
            assert config.model.vocabulary is not None
            found = bench_transformer(config, config.model.vocabulary, steps, device)
        else:
            look = None
            if trace_to is not None and config is configs[0]:
                look = partial(_trace, costs, trace_to)
            found = bench_step(config, steps, look)
        rows.append(_row(config, name, found))
        _forget()
    dtype = torch.bfloat16 if configs[0].train.dtype == Dtype.bf16 else torch.float32
    most = ceilings(device, dtype).flops_per_second
    speeds = {row["mixer"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        speed = row["tokens_per_second"]
        row["mfu"] = speed * row["flops_per_token"] / (most * ranks)
        yardstick = speeds.get(BESIDE)
        row["ratio"] = speed / yardstick if yardstick else None
    train = configs[0].train
    return {
        "device": name_of(device),
        "ranks": ranks,
        "dtype": train.dtype.value,
        "sequence_length": stage.sequence_length,
        "tokens_per_step": stage.tokens_per_step,
        "steps": steps,
        "torch": torch.__version__,
        "matmul_flops_per_second": most,
        "rows": rows,
        "trace": str(trace_to) if trace_to else None,
        "largest_costs": costs or None,
    }


def _row(config: Config, name: str, found: dict[str, Any]) -> dict[str, Any]:
    assert config.model.vocabulary is not None
    keys = ("tokens_per_second", "median_step_seconds", "parameters", "peak_memory_bytes")
    return {
        "mixer": name,
        **{key: found[key] for key in keys},
        "planned_memory_bytes": found.get("planned_memory_bytes"),
        "flops_per_token": flops_per_token(config, config.model.vocabulary),
    }


def _trace(costs: list[dict[str, Any]], path: Path, step: Callable[[], Any]) -> None:
    """Every rank takes the steps; the first writes what it saw."""
    seen = trace(step, path if torch.distributed.get_rank() == 0 else None)
    costs += seen["largest_costs"]


def _forget() -> None:
    """Frees what the last model held, or the next one's peak would count it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_train(result: dict[str, Any]) -> None:
    """Print what `bench_train` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mixer")
    for name in ("tokens/s", "of attention's", "MFU", "parameters", "peak memory"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        ratio, peak = row["ratio"], row["peak_memory_bytes"]
        table.add_row(
            row["mixer"],
            f"{row['tokens_per_second']:,.0f}",
            f"{ratio:.2f}" if ratio else "",
            f"{row['mfu']:.1%}",
            human_count(row["parameters"]),
            human_bytes(peak) if peak else "",
        )
    ranks = f", {result['ranks']} ranks" if result["ranks"] > 1 else ""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{result['device']}{ranks}, {result['dtype']}, {result['tokens_per_step']:,} tokens a "
        f"step in sequences of {result['sequence_length']:,}, median of {result['steps']} steps; "
        f"MFU of {result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s, a large matrix product\n"
    )
    console.print(table)
    if result["largest_costs"]:
        console.print(f"largest costs of {result['rows'][0]['mixer']}, traced to {result['trace']}")
        for cost in result["largest_costs"]:
            console.print(
                f"{cost['milliseconds']:10.2f} ms a step {cost['share']:6.1%} "
                f"{cost['calls']:7.0f} x {cost['name'][:60]}"
            )

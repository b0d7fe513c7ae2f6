"""`nlscale bench layer`: one block of each mixer, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nlscale.bench.clock import ceilings, median_seconds, name_of
from nlscale.bench.progress import each
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.vocabulary import Config
from nlscale.model.block import Block
from nlscale.model.flops import flops_by_part
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.model.sizes import mlp_hidden
from nlscale.parallel.layout import process_groups


def bench_layer(configs: list[Config], repeats: int) -> dict[str, Any]:
    """Time one block of each configuration on one micro batch, warm; medians.

    Returns:
        What was measured on, and for each configuration `forward_ms` and `backward_ms` of the
        block, `mixer_forward_ms` and `mixer_backward_ms` of its mixer alone, `parameters`,
        `tokens_per_second`, `flops_per_second` by the count of `nlscale.model.flops` and their
        share `mfu` of the measured rate of a large matrix product, and on a GPU `kept_bytes`, what
        the forward pass leaves for the backward pass.
    """
    configs = [at_stage(config, largest(config)) for config in configs]
    rows = []
    for config in each("layer", configs, lambda config: config.model.mixer):
        with process_groups(config) as layout:
            device = layout.device
            rows.append(_measure(config, device, repeats))
    dtype = megatron_config(configs[0]).params_dtype
    most = ceilings(device, dtype).flops_per_second
    train, length = configs[0].train, configs[0].data.sequence_length
    return {
        "device": name_of(device),
        "dtype": train.dtype.value,
        "tokens": train.micro_batch * length,
        "sequence_length": length,
        "d_model": configs[0].model.d_model,
        "heads": configs[0].model.heads,
        "repeats": repeats,
        "matmul_flops_per_second": most,
        "rows": [row | {"mfu": row["flops_per_second"] / most} for row in rows],
    }


def _measure(config: Config, device: torch.device, repeats: int) -> dict[str, Any]:
    megatron = megatron_config(config)
    block = Block(config.model, megatron, mlp_hidden(config), config.train)
    initialize(block, config.run.seed, 0, 1)
    block.to(device)
    shape = (config.data.sequence_length, config.train.micro_batch, config.model.d_model)
    x = torch.randn(shape, device=device, dtype=megatron.params_dtype, requires_grad=True)

    def through_block() -> Tensor:
        out, update, _ = block(x)
        return out + update

    kept = None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        out = through_block()
        kept = torch.cuda.memory_allocated(device) - before - out.nbytes
        del out
    forward, backward = _passes(block, through_block, x, repeats)
    mixer_forward, mixer_backward = _passes(block.mixer, lambda: block.mixer(x)[0], x, repeats)
    tokens = shape[0] * shape[1]
    parts = flops_by_part(config, vocabulary=0)
    flops = tokens * sum(parts.values()) / config.model.layers
    return {
        "mixer": config.model.mixer,
        "parameters": sum(p.numel() for p in block.parameters()),
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "mixer_forward_ms": 1e3 * mixer_forward,
        "mixer_backward_ms": 1e3 * mixer_backward,
        "tokens_per_second": tokens / (forward + backward),
        "flops_per_second": flops / (forward + backward),
        "kept_bytes": kept,
    }


def _passes(
    module: nn.Module, run: Callable[[], Tensor], x: Tensor, repeats: int
) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    wanted = [x, *module.parameters()]
    d_out = torch.randn_like(x)

    def back(out: Tensor) -> None:
        torch.autograd.grad(out, wanted, d_out)

    forward = median_seconds(x.device, repeats, lambda _: run())
    return forward, median_seconds(x.device, repeats, back, run)


def print_layer(result: dict[str, Any]) -> None:
    """Print what `bench_layer` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mixer")
    for name in ("forward", "(mixer)", "backward", "(mixer)", "tokens/s", "MFU"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        times = [row[f"{part}forward_ms"] for part in ("", "mixer_")]
        times += [row[f"{part}backward_ms"] for part in ("", "mixer_")]
        table.add_row(
            row["mixer"], *(f"{x:.2f}" for x in times),
            f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}",
        )  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"one block on {result['device']}, {result['dtype']}, d_model {result['d_model']}, "
        f"{result['heads']} heads, {result['tokens']:,} tokens in sequences of "
        f"{result['sequence_length']:,}; milliseconds, median of {result['repeats']}\n"
    )
    console.print(table)

"""`nlscale bench scan`: the memory scan alone, beside softmax attention of the same shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nlscale.bench.clock import Ceilings, ceilings, here, median_seconds, name_of
from nlscale.bench.progress import each
from nlscale.config import recipe
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.vocabulary import MemoryConfig, ModelConfig
from nlscale.errors import UserError
from nlscale.model.flops import flops_by_part
from nlscale.model.mixers.module import Way
from nlscale.model.mixers.table import mixer


@dataclass(frozen=True)
class Size:
    """Of what is scanned."""

    batch: int
    length: int
    heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read BxTxHxD, such as 8x4096x16x64.

        Raises:
            UserError: it is not of that form.
        """
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text) is None:
            raise UserError(f"size {text!r} is not BATCHxTOKENSxHEADSxHEAD_DIM; try 8x4096x16x64")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, asdict(self).values()))


def parse_sizes(given: list[str] | None) -> list[Size]:
    """`Size.parse` of each; of some that suit the device, where none is given."""
    on_gpu = ["8x4096x16x64", "2x16384x16x64", "8x4096x8x128"]
    default = on_gpu if here().type == "cuda" else ["1x256x2x32"]
    return [Size.parse(text) for text in given or default]


def model_of(name: str, size: Size, chunk: int) -> ModelConfig:
    """A model whose mixer scans that."""
    memory = MemoryConfig(chunk=chunk, **MIXER_PRESETS.get(name, {}))  # type: ignore[arg-type]
    heads = size.heads
    return ModelConfig(mixer=name, heads=heads, d_model=heads * size.head_dim, memory=memory)


def ways(name: str, size: Size, chunk: int, dtype: torch.dtype, device: torch.device) -> list[Way]:
    """Every way to compute what lies between the projections of a mixer."""
    facts, model = mixer(name), model_of(name, size, chunk)
    return facts.module().ways(facts, model, size.batch, size.length, dtype, device)


def bench_scan(sizes: list[Size], mixers: list[str], chunk: int, repeats: int) -> dict[str, Any]:
    """Time forward and backward passes, warm; medians.

    On a GPU inputs are bf16, which the kernels take; the torch chunk form is timed beside them, on
    fp32 inputs. On a CPU all is fp32 and torch.

    Returns:
        What was measured on, its ceilings, and for each size and mixer `forward_ms`,
        `backward_ms`, `peak_bytes` (GPU: allocated at most beyond the inputs) and the floors: the
        FLOPs as `nlscale.model.flops` counts them over the measured rate of a matrix product, and
        inputs, reads and their derivatives, each read or written once, over that of a copy.
    """
    device = here()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    most = ceilings(device, dtype)
    rows = []
    parts = [(size, name) for size in sizes for name in mixers]
    for size, name in each("scan", parts, lambda part: f"{part[0]} by {part[1]}"):
        floor = _floors(name, size, chunk, dtype, most)
        for path, run, leaves in ways(name, size, chunk, dtype, device):
            measured = _measure(device, run, leaves, repeats)
            rows.append({"size": str(size), "mixer": name, "path": path, **measured, **floor})
    return {
        "device": name_of(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": triton_version(),
        "chunk": chunk,
        "repeats": repeats,
        "matmul_flops_per_second": most.flops_per_second,
        "copy_bytes_per_second": most.bytes_per_second,
        "rows": rows,
    }


def _measure(
    device: torch.device, run: Callable[[], Tensor], leaves: list[Tensor], repeats: int
) -> dict[str, Any]:
    out = run()
    d_out = torch.randn_like(out)
    del out
    peak, on_gpu = None, device.type == "cuda"
    if on_gpu:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    forward = median_seconds(device, repeats, lambda _: run())
    backward = median_seconds(
        device, repeats, lambda out: torch.autograd.grad(out, leaves, d_out), run
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) - before
    return {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward, "peak_bytes": peak}


def _floors(
    name: str, size: Size, chunk: int, dtype: torch.dtype, most: Ceilings
) -> dict[str, float]:
    facts = mixer(name)
    overrides = [
        "data.dir=none",
        f"data.sequence_length={size.length}",
        f"model.mixer={name}",
        "model.layers=1",
        f"model.d_model={size.heads * size.head_dim}",
        f"model.heads={size.heads}",
        f"model.memory.chunk={chunk}",
    ]
    parts = flops_by_part(recipe.load(None, overrides).config, vocabulary=1)
    tokens = size.batch * size.length
    flops = tokens * parts[facts.core]
    tile = tokens * size.heads * size.head_dim * dtype.itemsize
    column = tokens * size.heads * facts.logit_bytes
    forward, backward = 4 * tile + 2 * column, 7 * tile + 4 * column
    return {
        "flops_forward_ms": 1e3 * flops / 3 / most.flops_per_second,
        "flops_backward_ms": 1e3 * flops * 2 / 3 / most.flops_per_second,
        "bytes_forward_ms": 1e3 * forward / most.bytes_per_second,
        "bytes_backward_ms": 1e3 * backward / most.bytes_per_second,
    }


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def print_scan(result: dict[str, Any]) -> None:
    """Print what `bench_scan` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("BxTxHxD", "mixer", "by"):
        table.add_column(name)
    for name in ("forward", "floor", "backward", "floor"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        floors = [
            max(row[f"flops_{way}_ms"], row[f"bytes_{way}_ms"]) for way in ("forward", "backward")
        ]
        table.add_row(
            row["size"], row["mixer"], row["path"], f"{row['forward_ms']:.2f}",
            f"{floors[0]:.2f}", f"{row['backward_ms']:.2f}", f"{floors[1]:.2f}",
        )  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{result['device']}, {result['dtype']}, chunks of {result['chunk']}; milliseconds, median "
        f"of {result['repeats']}\n"
        f"at best {result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s (a matrix product) and "
        f"{result['copy_bytes_per_second'] / 1e9:.3g} GB/s (a copy); the floor is the slower of "
        f"both\n"
    )
    console.print(table)

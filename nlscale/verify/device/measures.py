"""What the parts of `nlscale bench device` do, each in a process of its own.

Each is called with the folder that it may leave files in, and whether sizes are tiny: those that
any machine takes, where numbers say nothing and only the way to them is tried. Each returns what
JSON can hold, and under `says` one line of it.
"""

from __future__ import annotations

import csv
import io
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from nlscale.bench.clock import ceilings, here, name_of
from nlscale.bench.curves import train_with_and_without_kernels
from nlscale.bench.decode import bench_decoding
from nlscale.bench.links import all_reduce_bandwidth, overlap_reached
from nlscale.bench.scan import Size, bench_scan, triton_version
from nlscale.bench.step import bench_step
from nlscale.bench.trace import trace
from nlscale.bench.transformer import bench_transformer
from nlscale.cluster.life.place import place
from nlscale.config import recipe
from nlscale.config.units import human_bytes
from nlscale.config.vocabulary import Config
from nlscale.ops.compiler import compiler_for
from nlscale.verify.device.parts import SCANS, STEPS, TORCH
from nlscale.verify.device.version import version
from nlscale.verify.kernels import check_scan

_SCANNED = ["hope", "gated-delta", "attention"]
"""The first is the one whose time is judged."""
_WRONG = 1e9
"""An error over its bound where that is no number, or another one the second time."""
_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)
_SMI_SECONDS = 30
_TINY_MODEL = [
    *("model.layers=2", "model.d_model=64", "model.heads=2", "model.memory.chunk=16"),
    *("model.vocabulary=64", "train.dtype=bf16"),
]


_TINY_CURVES = [
    *("model.layers=1", "model.d_model=32", "model.heads=2", "data.sequence_length=32"),
    *("train.global_batch=4", "train.micro_batch=2", "train.validation_sequences=4"),
]
_DECODED = ([512, 4096, 16384], 64, [1, 8], 3)
"""Contexts, tokens decoded, sequences at a time, repeats of reading the context."""
_DECODED_TINY = ([8, 40], 6, [1, 2], 1)


def device(folder: Path, tiny: bool) -> dict[str, Any]:
    """What it is called, what runs it, and how its clocks stand, which are left as they are."""
    device, gpu = here(), None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            **_nvidia_smi(str(found.uuid)),
        }
    name = name_of(device)
    compiler = compiler_for(device)
    versions = {
        "nlscale": version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "ptxas": None if compiler is None else compiler.ptxas,
        "cuda": torch.version.cuda,
    }
    about = f"{name}, torch {versions['torch']}, Triton {versions['triton'] or 'missing'}"
    return {
        "device": name,
        "ranks": place().world,
        "sizes": "tiny" if tiny else "full",
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **versions,
        "gpu": gpu,
        "says": about,
    }


def _nvidia_smi(uuid: str) -> dict[str, str]:
    """Its answers by field; none where the tool is not there."""
    command = [
        "nvidia-smi", "--format=csv,noheader", f"--id=GPU-{uuid.removeprefix('GPU-')}",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
    ]  # fmt: skip
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = list(csv.reader(io.StringIO(ran.stdout), skipinitialspace=True))
    return dict(zip(_SMI_FIELDS, rows[0], strict=False)) if rows else {}


def ceilings_of(folder: Path, tiny: bool) -> dict[str, Any]:
    """What the device does at best: FLOPs a second in bf16 and fp32, bytes a second."""
    dtypes = (torch.bfloat16, torch.float32)
    bf16, fp32 = (ceilings(here(), dtype, small=tiny) for dtype in dtypes)
    return {
        "bf16_flops_per_second": bf16.flops_per_second,
        "fp32_flops_per_second": fp32.flops_per_second,
        "copy_bytes_per_second": max(bf16.bytes_per_second, fp32.bytes_per_second),
        "says": f"{bf16.flops_per_second / 1e12:.3g} TFLOP/s in bf16, "
        f"{fp32.flops_per_second / 1e12:.3g} in fp32; {bf16.bytes_per_second / 1e9:.4g} GB/s",
    }


def kernels(folder: Path, tiny: bool, chunk: int, head: int) -> dict[str, Any]:
    """As `nlscale bench scan --check`, of one chunk and head size; `worst` is over its bound."""
    found = check_scan(chunk, head, short=tiny)
    wrong = [row for row in found["rows"] if not row["ok"]]
    row = max(found["rows"], key=lambda row: row["error"] / row["bound"])
    says = f"{len(found['rows'])} checks right, worst off by"
    if wrong:
        names = sorted({f"{each['kernel']} ({each['case']}, {each['size']})" for each in wrong})
        says = f"WRONG: {', '.join(names)}; worst {row['what']} of {row['kernel']}, off by"
    says += f" {row['error']:.1e} of at most {row['bound']:g}"
    worst = row["error"] / row["bound"] if found["ok"] else _WRONG
    return {**found, "worst": worst, "says": says}


def scan(folder: Path, tiny: bool, size: str) -> dict[str, Any]:
    """As `nlscale bench scan`, of one size."""
    sizes = [Size.parse("1x64x2x16" if tiny else SCANS[size])]
    chunk, repeats = (16, 1) if tiny else (64, 10)
    found = bench_scan(sizes, _SCANNED, chunk, repeats)
    row = next(row for row in found["rows"] if row["mixer"] == _SCANNED[0])
    says = f"{_SCANNED[0]} {row['forward_ms']:.2f} + {row['backward_ms']:.2f} ms by {row['path']}"
    return {**found, "of_floor": of_floor(row), "says": f"{says}, {of_floor(row):.1f} x its floor"}


def of_floor(row: dict[str, Any]) -> float:
    """Forward and backward pass of a row of `bench_scan` over the floors of both."""
    ways = ("forward", "backward")
    floors = [max(row[f"flops_{way}_ms"], row[f"bytes_{way}_ms"]) for way in ways]
    return float(sum(row[f"{way}_ms"] for way in ways) / sum(floors))


def config_of(size: str, row: str, tiny: bool) -> Config:
    """Of a step part: every row has the same number of parameters, and one level."""
    step = STEPS[size]
    batch, length = (2, step.length // 64) if tiny else (step.batch, step.length)
    mixer = "attention" if row == TORCH else row
    overrides = [
        *("data.dir=none", "model.hidden=null", "levels=[1]", f"model.mixer={mixer}"),
        *(f"train.global_batch={batch}", f"train.micro_batch={batch}"),
        *(f"data.sequence_length={length}", *(_TINY_MODEL if tiny else ())),
    ]
    return recipe.load(step.recipe, overrides).config


def step(folder: Path, tiny: bool, size: str, row: str) -> dict[str, Any]:
    """Whole training steps on random tokens, through the ordinary path or in torch alone."""
    config, steps = config_of(size, row, tiny), 2 if tiny else 20
    assert config.model.vocabulary is not None
    if row == TORCH:
        found = bench_transformer(config, config.model.vocabulary, steps, here())
    else:
        found = bench_step(config, steps)
    says = f"{found['tokens_per_second']:,.0f} tokens/s"
    peak, planned = found["peak_memory_bytes"], found.get("planned_memory_bytes")
    if peak:
        says += f", {human_bytes(peak)} at most"
        says += f" of {human_bytes(planned)} planned" if planned else ""
    return {**found, "row": row, "says": says}


def costs(folder: Path, tiny: bool) -> dict[str, Any]:
    """Where the time of a step of Hope goes, and what the host waits for; leaves `trace.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    looked: dict[str, Any] = {}

    def look(take_step: Any) -> None:
        looked.update(trace(take_step, folder / "trace.json"))

    found = bench_step(config_of("4k", "hope", tiny), 2 if tiny else 5, look)
    first = looked["largest_costs"][0]
    says = f"largest {first['name'][:40]}, {first['share']:.0%} of {looked['busy_ms']:.0f} ms"
    if looked["host_waits"] is not None:
        says += f"; the host waits {looked['host_waits']:g} times a step"
    return {**looked, "median_step_seconds": found["median_step_seconds"], "says": says}


def links(folder: Path, tiny: bool) -> dict[str, Any]:
    """Bandwidth of all-reduces in the groups of training: inside a node, between nodes, of all."""
    found = all_reduce_bandwidth(
        _together(tiny), [0.25] if tiny else [1, 16, 256], 2 if tiny else 10
    )
    said = [
        f"{name.replace('_', ' ')} {group['sizes'][-1]['bus_bytes_per_second'] / 1e9:.3g} GB/s"
        for name, group in found["groups"].items()
        if group is not None
    ]
    return {**found, "says": f"bus bandwidth {', '.join(said)}"}


def overlap(folder: Path, tiny: bool) -> dict[str, Any]:
    """How much of the reductions between nodes whole training steps hide."""
    found = overlap_reached(_together(tiny), 8)
    if found["because"] is not None:
        return {**found, "says": found["because"]}
    waited = [1e3 * found[way]["waited_seconds"] for way in ("without_overlap", "with_overlap")]
    share = found["share_hidden"]
    hidden = "nothing to hide" if share is None else f"{share:.0%} hidden"
    says = (
        f"{waited[1]:.1f} ms a step waited for the link, {waited[0]:.1f} without overlap: {hidden}"
    )
    return {**found, "says": says}


def _together(tiny: bool) -> Config:
    """Of all ranks: levels of several periods, a micro batch a rank."""
    ranks, step = place().world, STEPS["4k"]
    overrides = [
        *("data.dir=none", "levels=[1,2,4,8]", f"train.global_batch={ranks}"),
        *("train.micro_batch=1", *(_TINY_MODEL if tiny else ())),
        *(["data.sequence_length=64"] if tiny else ()),
    ]
    return recipe.load(step.recipe, overrides).config


def decode(folder: Path, tiny: bool) -> dict[str, Any]:
    """How fast tokens come one by one, and whether they are those of reading at once: `worst`."""
    configs = [config_of("4k", mixer, tiny) for mixer in _SCANNED]
    contexts, new, batches, repeats = _DECODED_TINY if tiny else _DECODED
    found = bench_decoding(configs, contexts, new, batches, repeats)
    said = [
        f"{row['mixer']} {row['token_ms']:.2f} ms"
        for row in found["rows"]
        if row["batch"] == batches[0] and row["context"] == contexts[-1]
    ]
    row = max(found["rows"], key=lambda row: row["difference"] / row["bound"])
    says = f"a token after {contexts[-1]:,}: {', '.join(said)}"
    if not found["ok"]:
        says = (
            f"WRONG: {row['mixer']} after {row['context']} tokens is off by "
            f"{row['difference']:.1e} of at most {row['bound']:.1e}; {says}"
        )
    return {**found, "worst": row["difference"] / row["bound"], "says": says}


def curves(folder: Path, tiny: bool) -> dict[str, Any]:
    """The quickstart with kernels and without; leaves `curves.png`."""
    steps = 6 if tiny else 300
    found = train_with_and_without_kernels(folder, steps, _TINY_CURVES if tiny else [])
    ratio = found["kernels"]["tokens_per_second"] / found["torch"]["tokens_per_second"]
    says = (
        f"final losses {found['final_difference']:.2%} apart after {steps} steps, at most "
        f"{found['bound']:.0%}; {ratio:.1f} x as fast with kernels"
    )
    return {**found, "says": says}

"""Whether the kernels that a run is about to use are right on its device (`nlscale.ops.check`)."""

from __future__ import annotations

import torch

from nlscale.config.vocabulary import Config, Dtype
from nlscale.levels.spectrum import BLOCK, INTEGER_BITS
from nlscale.model.pattern import block_kinds
from nlscale.ops.check import (
    BOUNDS,
    accumulation_errors,
    loss_errors,
    packing_errors,
    refuse_beyond,
)


def check_kernels(config: Config, columns: int, device: torch.device) -> None:
    """Compare the kernels that a run is about to use with float64.

    Triton compiles a kernel anew for other sizes: these are launched with those of a step.

    Args:
        config: the run.
        columns: of the vocabulary that this rank holds; 0 where it holds no head.
        device: where it runs.

    Raises:
        TrainingFailed: a kernel is wrong.
    """
    dtype = torch.bfloat16 if config.train.dtype == Dtype.bf16 else torch.float32
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        of_loss = loss_errors(columns, dtype, device, config.train.z_loss) if columns else {}
        of_mixers = [
            kind.facts.module().kernel_errors(kind.facts, kind.config, dtype, device)
            for kind in block_kinds(config)
        ]
        sums = accumulation_errors(dtype, device)
        of_wires: dict[str, float] = {}
        for wire in sorted({level.wire for level in config.levels.spectrum} & INTEGER_BITS.keys()):
            of_wires |= packing_errors(INTEGER_BITS[wire], BLOCK, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a micro batch of one layer was there
    for of_libraries in ({"Triton": of_loss}, *of_mixers):
        for library, errors in of_libraries.items():
            refuse_beyond(BOUNDS[dtype], errors, library, device)
    refuse_beyond(BOUNDS[torch.float32], sums, "torch", device)
    refuse_beyond(BOUNDS[torch.float32], of_wires, "Triton", device)

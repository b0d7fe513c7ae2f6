"""Whether the scan of a mixer with a memory is right on a device."""

from __future__ import annotations

import torch

from nlscale.config.vocabulary import ModelConfig, head_dim
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.ops.check import ScanInputs, relative_errors, scan_results


def inputs_of(
    facts: MemoryFacts,
    model: ModelConfig,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    heads: int | None = None,
) -> ScanInputs:
    """Random ones of a mixer with a memory, for so many of its heads (None: all)."""
    memory = model.memory
    return ScanInputs(
        facts.rules(model),
        (batch, heads or model.heads, length, head_dim(model)),
        facts.modifies_itself,
        float(memory.lambda_init or 0.0),
        (float(memory.eta_bias or 0.0), memory.alpha_bias),
        dtype,
        device,
    )


def scan_errors(
    facts: MemoryFacts, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Of the scan in this chunk and head size; none where it does not run through the kernels."""
    heads, chunk = min(2, model.heads), model.memory.chunk
    inputs = inputs_of(facts, model, 1, 2 * chunk + chunk // 2 + 1, dtype, device, heads)
    if inputs.path == "torch":
        return {}
    inputs.make_keys_alike()
    weight = torch.randn_like(inputs.leaves["a"])
    want = scan_results(inputs.to(torch.float64, "cpu"), weight, reference=True)
    errors = relative_errors(scan_results(inputs, weight), want)
    return {f"{name} of the memory scan": error for name, error in errors.items()}

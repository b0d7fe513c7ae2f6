"""Whether the kernels that a run is about to use are right on its device (`nlscale.ops.check`)."""

from __future__ import annotations

import torch

from nlscale.config.vocabulary import ModelConfig
from nlscale.model.mixers.table import mixer
from nlscale.ops.check import BOUNDS, accumulation_errors, loss_errors, refuse_beyond


def check_kernels(
    model: ModelConfig,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    documents: bool = False,
) -> None:
    """Compare the kernels that a run is about to use with float64.

    Args:
        model: of the run.
        columns: of the vocabulary that this rank holds; 0 where it holds no head.
        dtype: of activations.
        device: where it runs.
        documents: whether they are told apart (data.document_mask).

    Raises:
        TrainingFailed: a kernel is wrong.
    """
    facts = mixer(model.mixer)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        of_loss = loss_errors(columns, dtype, device) if columns else {}
        of_mixer = facts.module().kernel_errors(facts, model, dtype, device, documents)
        sums = accumulation_errors(dtype, device)
    of_libraries = {"Triton": of_loss}
    for library, errors in of_mixer.items():
        of_libraries[library] = of_libraries.get(library, {}) | errors
    for library, errors in of_libraries.items():
        refuse_beyond(BOUNDS[dtype], errors, library, device)
    refuse_beyond(BOUNDS[torch.float32], sums, "torch", device)

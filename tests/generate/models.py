"""Tiny models with weights drawn here, saved as a run saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint.saved_runs import config, save, state
from torch import Tensor

from nlscale.checkpoint.store.store import Checkpoint
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.alone import alone

VOCABULARY = 61
PATHS = ("hope", "hope-pure", "gated-delta", "linear-attention", "attention", "sliding-window")
"""A mixer of each way through the code; the others differ from one of them in numbers alone."""


def saved(run: Path, *overrides: str, step: int = 6, seed: int = 1) -> Checkpoint:
    """A checkpoint of a model whose every part has a say in its logits."""
    of = config(*overrides)
    with alone():
        assert of.model.vocabulary is not None  # VOCABULARY, unless they say another
        model = Decoder(of, megatron_config(of), of.model.vocabulary)
        initialize(model, seed, 0, 1)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"weights/{name}": p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
    }
    return save(run, step, tensors, state(step, of))


def random_tokens(batch: int, length: int) -> Tensor:
    """[batch, length]."""
    return torch.randint(VOCABULARY, (batch, length))

"""Tiny models twice: ours, and the class of transformers with the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from checkpoint.saved_runs import config, state
from torch import Tensor

from nlscale.checkpoint.export.configuration import NlscaleConfig
from nlscale.checkpoint.export.huggingface import described_for
from nlscale.checkpoint.export.modeling import NlscaleForCausalLM
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.alone import alone

VOCABULARY, PADDING = 61, 60


@dataclass
class Pair:
    native: Decoder
    exported: NlscaleForCausalLM

    def logits(self, tokens: Tensor) -> Tensor:
        """Of ours, [batch, n, vocabulary]."""
        with alone(), torch.no_grad():
            return self.native.logits(self.native.hidden(tokens, carry=False)[0]).transpose(0, 1)


def pair(*overrides: str) -> Pair:
    """Every part has a say in the logits."""
    of = config(*overrides)
    with alone():
        native = Decoder(of, megatron_config(of), VOCABULARY)
        initialize(native, 1, 0, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    exported = NlscaleForCausalLM(configuration(*overrides)).eval()
    missing, unexpected = exported.load_state_dict(dict(native.named_parameters()), strict=False)
    assert not unexpected and missing == ["head.weight"] * of.model.tie_embeddings
    exported.tie_weights()
    return Pair(native, exported)


def configuration(*overrides: str) -> NlscaleConfig:
    of = config(*overrides)
    own = {"torch_dtype": "float32", **state(6, of), "nlscale": {}}
    return NlscaleConfig(**described_for(own, of), pad_token_id=PADDING)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length], without the one that is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PADDING, (batch, length), generator=generator)

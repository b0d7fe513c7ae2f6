"""One token of every row through the whole model, without a derivative (docs/concepts/memory.md).

The modules of the model are made for long pieces on many ranks, and what they do around their
products costs more than these where a piece is a token. Here are the same products and as few
operations between them as there can be, for a model that is in this process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.model.decoder import Decoder
from nlscale.model.mixers.module import OneToken
from nlscale.ops.by_hand import wide
from nlscale.ops.one_token import RMSNorm, swiglu

Level = Callable[[Tensor], None]
"""Adds what it makes of the residual stream, [batch, d_model], to it, in place."""


class DecoderOneToken:
    """A decoder that reads token by token; it uses the weights of the model, and copies few."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.embedding is not None and decoder.is_last, "the whole model"
        self.embedding = decoder.embedding.weight
        self.blocks: list[tuple[str, _Norm, OneToken, list[Level]]] = []
        for index, module in decoder.blocks.items():
            block: Any = module
            levels = _levels(block.cms)
            self.blocks.append((index, _Norm(block.norm), block.mixer.one_token(), levels))
        self.norm = _Norm(decoder.norm, decoder.width_multiplier)
        head = decoder.head.weight
        self.head = (self.embedding if head is None else head).mT

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold `logits`."""
        return all(mixer.capturable for _, _, mixer, _ in self.blocks)

    def logits(self, tokens: Tensor, states: dict[str, Any], active: Tensor | None) -> Tensor:
        """tokens [batch] -> logits [batch, vocabulary].

        Args:
            tokens: ids.
            states: of the blocks, which are written to or replaced.
            active: rows that read their token, bool [batch], on the CPU; None: all.
        """
        x = F.embedding(tokens, self.embedding)
        for index, norm, mixer, levels in self.blocks:
            update, states[index] = mixer(norm(x), states[index], active)
            x.add_(update)
            for level in levels:
                level(x)
        return torch.mm(self.norm(x), self.head)

    def advance(self, states: dict[str, Any], active: Tensor | None) -> None:
        """What the host keeps account of, after `logits`."""
        for index, _, mixer, _ in self.blocks:
            mixer.advance(states[index], active)


class _Norm:
    """A norm of the residual stream, in the dtype of that."""

    def __init__(self, norm: Any, divisor: float = 1.0) -> None:
        weight = norm.weight
        dtype = wide(weight)
        self.dtype = weight.dtype
        self.norm = RMSNorm(len(weight), norm.eps, weight.to(dtype) / divisor, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x).to(self.dtype)


def _levels(cms: Any) -> list[Level]:
    """Of the levels one after another, or of all of them side by side."""
    norms = [_Norm(norm) for norm in cms.norms]
    weights = [(mlp.up.weight.mT, mlp.down.weight.mT) for mlp in cms.mlps]
    if cms.mixture is None:
        return [
            partial(_level, norm, up, down) for norm, (up, down) in zip(norms, weights, strict=True)
        ]
    share = torch.softmax(cms.mixture, 0).unbind()

    def side_by_side(x: Tensor) -> None:
        normed = norms[0](x)
        for part, (up, down) in zip(share, weights, strict=True):
            x.addmm_(swiglu(torch.mm(normed, up)).mul_(part), down)

    return [side_by_side]


def _level(norm: _Norm, up: Tensor, down: Tensor, x: Tensor) -> None:
    x.addmm_(swiglu(torch.mm(norm(x), up)), down)

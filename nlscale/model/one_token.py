"""One token of every row through the whole model, without a derivative (docs/concepts/memory.md).

The modules of the model are made for long pieces on many ranks, and what they do around their
products costs more than these where a piece is a token. Here are the same products and as few
operations between them as there can be, for a model that is in this process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.model.context import BlockState, ContextState
from nlscale.model.decoder import Decoder
from nlscale.model.mixers.module import OneToken
from nlscale.ops.by_hand import wide
from nlscale.ops.one_token import RMSNorm, swiglu

Level = Callable[[Tensor, "Reading"], None]
"""Adds what it makes of the residual stream, [batch, d_model], to it, in place."""


class Reading(NamedTuple):
    """What the MLPs of a block are given beside the residual stream."""

    contexts: dict[str, ContextState]
    """Of those that change, by their places; written to."""
    active: Tensor | None
    """Rows that read their token; None: all."""


class DecoderOneToken:
    """A decoder that reads token by token; it uses the weights of the model, and copies few."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.embedding is not None and decoder.is_last, "the whole model"
        self.embedding = decoder.embedding.weight
        self.blocks: list[tuple[str, _Norm, OneToken, list[Level]]] = []
        self.changes = any(block.cms.chunks for block in decoder.blocks.values())  # type: ignore
        self.mlps: list[Any] = [m for b in decoder.blocks.values() for m in b.cms.mlps]  # type: ignore
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
        still = not self.changes and all(mlp.changes is None for mlp in self.mlps)
        return still and all(mixer.capturable for _, _, mixer, _ in self.blocks)

    def logits(self, tokens: Tensor, states: dict[str, Any], active: Tensor | None) -> Tensor:
        """tokens [batch] -> logits [batch, vocabulary].

        Args:
            tokens: ids.
            states: of the blocks, which are written to or replaced.
            active: rows that read their token, bool [batch], on the CPU; None: all.
        """
        x = F.embedding(tokens, self.embedding)
        for index, norm, mixer, levels in self.blocks:
            state, contexts = _apart(states[index])
            update, state = mixer(norm(x), state, active)
            states[index] = _together(states[index], state)
            x.add_(update)
            for level in levels:
                level(x, Reading(contexts, active))
        return torch.mm(self.norm(x), self.head)

    def advance(self, states: dict[str, Any], active: Tensor | None) -> None:
        """What the host keeps account of, after `logits`."""
        for index, _, mixer, _ in self.blocks:
            mixer.advance(_apart(states[index])[0], active)


class _Norm:
    """A norm of the residual stream, in the dtype of that."""

    def __init__(self, norm: Any, divisor: float = 1.0) -> None:
        weight = norm.weight
        dtype = wide(weight)
        self.dtype = weight.dtype
        self.norm = RMSNorm(len(weight), norm.eps, weight.to(dtype) / divisor, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x).to(self.dtype)


def _apart(state: Any) -> tuple[Any, dict[str, ContextState]]:
    """The state of a block's mixer, and those of its MLPs that change."""
    return (state.mixer, state.contexts) if isinstance(state, BlockState) else (state, {})


def _together(before: Any, mixer: Any) -> Any:
    """The state of a block, whose mixer has gone on."""
    if not isinstance(before, BlockState):
        return mixer
    return BlockState(mixer, before.contexts, before.chunks)


def _levels(cms: Any) -> list[Level]:
    """Of the levels one after another, or of all of them side by side."""
    norms = [_Norm(norm) for norm in cms.norms]
    weights = [
        (mlp, mlp.up.weight.mT, mlp.down.weight.mT, _change(cms, place))
        for place, mlp in enumerate(cms.mlps)
    ]
    if cms.mixture is None:
        return [partial(_level, norm, *of) for norm, of in zip(norms, weights, strict=True)]
    share = torch.softmax(cms.mixture, 0).unbind()

    def side_by_side(x: Tensor, reading: Reading) -> None:
        normed = norms[0](x)
        for part, (mlp, up, down, change) in zip(share, weights, strict=True):
            hidden = swiglu(_changed(mlp, 0, normed, torch.mm(normed, up)))
            if change is not None:
                x.add_(part * change(normed, hidden, reading))
            x.addmm_(hidden.mul_(part), down)
            _changed(mlp, 1, hidden, x)

    return [side_by_side]


def _level(
    norm: _Norm,
    mlp: Any,
    up: Tensor,
    down: Tensor,
    change: Change | None,
    x: Tensor,
    reading: Reading,
) -> None:
    normed = norm(x)
    hidden = swiglu(_changed(mlp, 0, normed, torch.mm(normed, up)))
    x.addmm_(hidden, down)
    _changed(mlp, 1, hidden, x)
    if change is not None:
        x.add_(change(normed, hidden, reading))


def _changed(mlp: Any, place: int, x: Tensor, y: Tensor) -> Tensor:
    """y, with the product of x [batch, inputs] and the change of a weight, where there is one,
    added in place: see `nlscale.model.cms.LevelMLP.changes`."""
    if mlp.changes is not None:
        y.add_(torch.bmm(mlp.changes[place], x[..., None])[..., 0])
    return y


Change = Callable[[Tensor, Tensor, Reading], Tensor]
"""What the change of an MLP adds to its output, of its input and hidden units."""


def _change(cms: Any, place: int) -> Change | None:
    """Of an MLP that changes inside the context; None: it does not."""
    key = str(place)
    if key not in cms.contexts:
        return None
    module = cms.contexts[key]
    window, target = module.convolution, module.target.weight.mT

    def change(x: Tensor, hidden: Tensor, reading: Reading) -> Tensor:
        state = reading.contexts[key]
        seen = torch.cat([state.tail, x[:, None]], 1)
        v = torch.mm((seen * window).sum(1), target)
        if reading.active is None:
            state.tail = seen[:, 1:]
        else:
            state.tail = seen[:, 1:].where(reading.active.to(x.device)[:, None, None], state.tail)
        y = state.add(hidden, v, module.chunk, module.decay, reading.active)
        return module.rate * y

    return change

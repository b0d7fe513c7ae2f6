"""A block of the model in plain torch, without megatron-core: what an export to Hugging Face is of.

Parameters have the names, shapes and meaning of those of `nlscale.model.block` and
`nlscale.model.cms`, and outputs are the same. All of it is on one device and differentiated by
autograd. Tensors are [batch, time, d_model].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
"""What a mixer carries from one piece of the sequences to the next, rows first in every tensor."""


class PlainMixer(nn.Module):
    """A mixer over pieces of sequences that may be of different lengths.

    One is made of `d_model`, `norm_eps` and, by their names, the options that its facts give
    (`nlscale.model.mixers.facts.MixerFacts.plain_options`). Parameters of its own are drawn by its
    `initialize(std, residual_std)`, as those of `PlainLinear` are.
    """

    def forward(self, x: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        """Mix a piece of each row.

        Args:
            x: [batch, time, d_model].
            state: where an earlier piece ended; None at the start.
            lengths: tokens of each row that are read, int64 [batch]; the rest of a row changes
                nothing, and what is returned for it means nothing (but is finite).

        Returns:
            What is to be added to the residual stream, and the state after the piece.
        """
        raise NotImplementedError


class PlainLinear(nn.Linear):
    """A product without a bias; `into_residual` says where it leads."""

    def __init__(self, inputs: int, outputs: int, into_residual: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.into_residual = into_residual

    def initialize(self, std: float, residual_std: float) -> None:
        """Draw the weights of a model that is not trained yet, as every module here draws its own.

        Args:
            std: of projections from the residual stream.
            residual_std: of those into it.
        """
        nn.init.normal_(self.weight, std=residual_std if self.into_residual else std)


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight along the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def initialize(self, std: float, residual_std: float) -> None:
        nn.init.ones_(self.weight)


class PlainMLP(nn.Module):
    """SwiGLU: W_down ( SiLU(W_gate x) * W_up x ); `up` holds W_gate above W_up."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.up = PlainLinear(d_model, 2 * hidden)
        self.down = PlainLinear(hidden, d_model, into_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PlainCMS(nn.Module):
    """The MLPs of a block, one a level, fastest first.

    sequential: x <- x + MLP_l(norm_l(x)) for each level in turn.
    independent: x + sum_l w_l MLP_l(norm(x)), w = softmax of learned logits.
    """

    def __init__(
        self, d_model: int, hidden: Sequence[int], independent: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(PlainMLP(d_model, h) for h in hidden)
        norms = 1 if independent else len(hidden)
        self.norms = nn.ModuleList(PlainRMSNorm(d_model, norm_eps) for _ in range(norms))
        if independent and len(hidden) > 1:
            self.mixture = nn.Parameter(torch.zeros(len(hidden)))
        else:
            self.register_parameter("mixture", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixture is None:
            for norm, mlp in zip(self.norms, self.mlps, strict=True):
                x = x + mlp(norm(x))
            return x
        normed = self.norms[0](x)
        weights = torch.softmax(self.mixture, 0)
        for weight, mlp in zip(weights, self.mlps, strict=True):
            x = x + weight * mlp(normed)
        return x

    def initialize(self, std: float, residual_std: float) -> None:
        if self.mixture is not None:
            nn.init.zeros_(self.mixture)


class PlainBlock(nn.Module):
    """x <- x + mixer(norm(x)); x <- CMS(x)."""

    def __init__(
        self,
        mixer: PlainMixer,
        d_model: int,
        hidden: Sequence[int],
        independent: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm = PlainRMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.cms = PlainCMS(d_model, hidden, independent, norm_eps)

    def forward(self, x: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        mixed, state = self.mixer(self.norm(x), state, lengths)
        return self.cms(x + mixed), state


def wide(x: Tensor) -> Tensor:
    """In at least fp32: the precision of states, gates and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Padding:
    """Rows whose tokens stand among padding, as rows that begin with their tokens, and back.

    Attributes:
        lengths: tokens of each row, int64 [batch]
    """

    def __init__(self, mask: Tensor) -> None:
        """`mask` [batch, time] is true where a token stands."""
        self.lengths = mask.sum(1)
        self._from = torch.argsort(~mask, dim=1, stable=True)  # tokens first, in their order
        self._to = (mask.cumsum(1) - 1).clamp(min=0)

    def close(self, x: Tensor) -> Tensor:
        """[batch, time, ...], tokens first."""
        return x[_rows(x), self._from]

    def open(self, x: Tensor) -> Tensor:
        """Each token where it stood; beside them something of no meaning."""
        return x[_rows(x), self._to]


def _rows(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)[:, None]

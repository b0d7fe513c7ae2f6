"""Rules over whole matrices: what they have in common (docs/concepts/optimizers.md).

A rank holds ranges of matrices, and keeps of each range what the rule keeps, as AdamW's moments are
kept. An update goes in three steps: on the ranges, element by element; on whole matrices, each at
the one rank that owns it; and on the ranges again. What is no matrix is updated by AdamW.

Nothing here waits for the device, and nothing changes where `found_inf` is set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nlscale.config.choices import UpdateScale
from nlscale.config.vocabulary import OptimizerConfig
from nlscale.ops.newton_schulz import orthogonalized
from nlscale.optim.adamw import parameter_groups

Ranges = Sequence[Tensor]
"""Flat, one a parameter of which this rank holds a range, in the order of `Exchange.ranges`."""
OfMatrices = Callable[..., "tuple[Tensor, ...]"]
"""(matrices [number, out, in], ...) -> the same number, or another, of such."""


class Exchange(Protocol):
    """How ranges become whole matrices; `nlscale.levels.exchange` is the one there is."""

    ranges: list[Any]
    """The parameters' ranges on this rank, as the optimizer holds them."""

    depths: list[int]
    """Of the block of each, from 0."""

    def on_whole(
        self,
        given: Sequence[Ranges],
        function: OfMatrices,
        results: int = 1,
        depths: Iterable[int] | None = None,
    ) -> list[list[Tensor]]:
        """`function` of whole matrices, each at its owner, handed back as ranges."""
        ...

    def of_matrix(self, ranges: Ranges, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The ranges, of each matrix times `function` of the mean of its squares, [matrices]."""
        ...


@dataclass(frozen=True)
class Taken:
    """Whether the update is made, on the device."""

    skipped: Tensor
    """bool []."""
    weight: Tensor
    """1 where it is, else 0, fp32 []."""

    def clean(self, gradients: Ranges) -> list[Tensor]:
        """The gradients, or zeros: 0 * NaN is NaN."""
        return [g.masked_fill(self.skipped, 0.0) for g in gradients]


class MatrixRule(torch.optim.AdamW):
    """AdamW over what is no matrix; of matrices, what a subclass says.

    Args:
        config: the numbers of all rules.
        width_multiplier: of the model (`nlscale.model.width`).
        parameters: tagged (`nlscale.model.init.tag`).
    """

    names: tuple[str, ...]
    """What it keeps of each range."""
    own_scale = False
    """Whether `directions` are of the size that they are to have, entries of AdamW's."""

    def __init__(
        self, config: OptimizerConfig, width_multiplier: float, parameters: list[Any]
    ) -> None:
        self.config = config
        self.exchange: Exchange | None = None
        """Set before the first update; None stays where no rank has a matrix."""
        self.updates = 0
        """That the group has made so far, set before each."""
        self.layers = 1
        """Blocks of the model."""
        rest = parameter_groups(config, [p for p in parameters if not p.matrix])
        scale = UpdateScale.adamw_rms if self.own_scale else config.matrices.scale
        matrices = matrix_groups(config, scale, [p for p in parameters if p.matrix])
        super().__init__(
            [*({**group, "matrices": False} for group in rest), *matrices],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps / width_multiplier,
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter; all ranks that share matrices do so at once."""
        if self.exchange is None:
            super().step(closure)
            return
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        gradients = [p.grad for p in self.exchange.ranges]
        self._step_matrices(self.exchange, [g for g in gradients if g is not None])

    def _step_matrices(self, exchange: Exchange, gradients: list[Tensor]) -> None:
        found_inf: Any = getattr(self, "found_inf", None)
        taken = _taken(found_inf, exchange.ranges)
        kept = [self._kept(p) for p in exchange.ranges]
        directions = self.directions(exchange, taken.clean(gradients), kept, taken)
        rate_of = {p: group for group in self.param_groups for p in group["params"]}
        for p, state, direction in zip(exchange.ranges, kept, directions, strict=True):
            group, step = rate_of[p], taken.weight.to(p.device)
            p.mul_(1 - step * (group["lr"] * group["weight_decay"]))
            p.sub_(direction * (step * group["lr"]))
            state["step"] += step

    def _kept(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state.update({name: torch.zeros_like(p) for name in self.names})
        return state  # type: ignore[no-any-return]

    def orthogonal(self, matrices: Tensor) -> Tensor:
        """Orthogonalised, of the size that `optimizer.matrices.scale` says; [number, out, in]."""
        own, out, into = self.config.matrices, *matrices.shape[1:]
        found = orthogonalized(matrices, own.coefficients, own.iterations, matrices.dtype)
        return found if self.own_scale else found * SCALES[own.scale](out, into)

    @abstractmethod
    def directions(
        self, exchange: Exchange, gradients: Ranges, kept: list[dict[str, Tensor]], taken: Taken
    ) -> list[Tensor]:
        """What is subtracted, times the rate, of each range, fp32; what is kept moves on.

        Args:
            exchange: for what takes whole matrices.
            gradients: fp32, of this rank's ranges; zeros where the update is not made.
            kept: of each range, by name.
            taken: whether it is made; if not, nothing that is kept may change.
        """


def _taken(found_inf: Tensor | None, ranges: Ranges) -> Taken:
    device = ranges[0].device if ranges else torch.device("cpu")
    if found_inf is None:
        found_inf = torch.zeros((), device=device)
    return Taken(found_inf > 0, 1.0 - found_inf)


def matrix_groups(
    config: OptimizerConfig, scale: UpdateScale, parameters: list[Any]
) -> list[dict[str, Any]]:
    """Matrices by how they are decayed and scaled by width, as torch's optimizers take them.

    An orthogonal update of the sizes keller and spectral moves what a matrix makes of its inputs by
    as much at every width: rate and decay stay. Of adamw-rms it grows as the root of the width m:
    the rate falls as 1 / sqrt(m), and the decay, which is multiplied by it, rises.
    """
    exponent = 0.5 if scale == UpdateScale.adamw_rms else 0.0
    kinds: dict[tuple[bool, float], list[Any]] = {}
    for p in parameters:
        kinds.setdefault((p.decays, p.width_multiplier**exponent), []).append(p)
    return [
        {
            "params": kinds[decays, wider],
            "weight_decay": config.weight_decay * wider if decays else 0.0,
            "wd_mult": float(decays and config.weight_decay > 0),
            "lr_mult": config.matrices.learning_rate / wider,
            "matrices": True,
        }
        for decays, wider in sorted(kinds, key=lambda kind: (not kind[0], kind[1]))
    ]


SCALES: dict[UpdateScale, Callable[[int, int], float]] = {
    UpdateScale.adamw_rms: lambda out, into: 0.2 * max(out, into) ** 0.5,
    UpdateScale.keller: lambda out, into: max(1.0, out / into) ** 0.5,
    UpdateScale.spectral: lambda out, into: (out / into) ** 0.5,
}
"""Size of the update of a matrix [out, in] over that of an orthogonal one."""

"""The gradient noise scale of a level, from what its windows hold.

The gradient g_i of a batch of n_i tokens, a sum over them, has E |g_i|^2 = n_i^2 |G|^2 + n_i S,
with G the mean gradient of a token and S the trace of its covariance. McCandlish et al. 2018 (arXiv
1812.06162, appendix A) find both from batches of two sizes. Here the small ones are the parts of a
window, the gradients of one node at one step, and the large one is the window over all nodes:

    A = sum_i |g_i|^2   Q = sum_i n_i^2   N = sum_i n_i   w = |sum_i g_i / N|^2   a = A / N^2
    q = Q / N^2         |G|^2 = (w - a) / (1 - q)         S = N (a - q w) / (1 - q)

Both are unbiased where the parts are drawn independently at the same weights: those of the level do
not change within a window, but those of faster levels do. S / |G|^2, in tokens, is the simple noise
scale, of the averages of both: of a quotient of single estimates the mean need not exist.

What it costs: the norms of the shards, which are taken at every step to see that they are finite;
of shards that cross, one more, before they do. The numbers travel with the consensus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlscale.levels.spectrum import SyncGroup

_DECAY = 0.98
"""Of the averages, an estimate: they hold about 50 **[choice]**."""


@dataclass
class GradientNoise:
    """What the window of a sync group holds for an estimate, and the averages of those so far."""

    counted: int = 0
    """N: targets that count of the parts that are in the window."""
    counted_squares: float = 0.0
    """Q."""
    squares: float = 0.0
    """A."""
    noise: float = 0.0
    """Decayed sum of the estimates of S."""
    signal: float = 0.0
    """The same of |G|^2."""
    weight: float = 0.0
    """Of the estimates in these sums: divided by it they are averages."""

    def add(self, square: float, counted: int, nodes: int) -> None:
        """Take a step into the window.

        Args:
            square: sum over the nodes of |g|^2.
            counted: its targets that count; each node is taken to have an equal part of them.
            nodes: that have a gradient of their own.
        """
        self.squares += square
        self.counted += counted
        self.counted_squares += counted**2 / nodes

    def clear(self) -> None:
        """Begin another window."""
        self.counted, self.counted_squares, self.squares = 0, 0.0, 0.0

    def see(self, noise: float, signal: float) -> None:
        """Take an estimate into the averages."""
        self.noise = _DECAY * self.noise + (1 - _DECAY) * noise
        self.signal = _DECAY * self.signal + (1 - _DECAY) * signal
        self.weight = _DECAY * self.weight + (1 - _DECAY)


def estimate(
    squares: float, counted_squares: float, counted: int, mean_square: float
) -> tuple[float, float] | None:
    """S and |G|^2 of a window; None where it has one part, or something is not finite.

    Args:
        squares: A.
        counted_squares: Q.
        counted: N.
        mean_square: w.
    """
    whole = float(counted) ** 2
    if counted == 0 or counted_squares > (1 - 1e-9) * whole:
        return None
    q, a = counted_squares / whole, squares / whole
    noise, signal = counted * (a - q * mean_square) / (1 - q), (mean_square - a) / (1 - q)
    return (noise, signal) if math.isfinite(noise) and math.isfinite(signal) else None


def see_windows(closed: Sequence[GradientNoise], mean_square: float) -> None:
    """Take the windows of a level that close together into the averages of their sync groups.

    Their norm is known for all of them alone, so that each gets an equal share of the estimate;
    windows of different steps or sizes, as at the end of a run, give none.

    Args:
        closed: of each, before it is cleared.
        mean_square: w of all of them together.
    """
    if len({(own.counted, own.counted_squares) for own in closed}) != 1:
        return
    first, squares = closed[0], sum(own.squares for own in closed)
    found = estimate(squares, first.counted_squares, first.counted, mean_square)
    if found is not None:
        for own in closed:
            own.see(*(value / len(closed) for value in found))


def noise_record(groups: Sequence[GradientNoise]) -> dict[str, float | None]:
    """The averages of a level in a train record, of its sync groups together.

    None before there is an estimate; no scale where that of |G|^2 is not above 0.
    """
    seen = [own for own in groups if own.weight]
    noise = sum(own.noise / own.weight for own in seen)
    signal = sum(own.signal / own.weight for own in seen)
    return {
        "gradient_noise_scale": noise / signal if signal > 0 else None,
        "gradient_noise": noise if seen else None,
        "gradient_signal": signal if seen else None,
    }


class StepSquares:
    """|g|^2 of a step on this node, of each sync group, as far as this rank has it.

    Args:
        groups: of this rank, `nlscale.levels.optimizers.GroupOptimizer`.
        order: the sync groups of the whole model.
        repeats: whether another rank of the tensor-parallel group counts what each of them holds
            whole.
        device: of the shards.
    """

    def __init__(
        self, groups: Sequence[Any], order: Sequence[SyncGroup], repeats: bool, device: torch.device
    ) -> None:
        self._shards: list[Tensor] = []
        self._repeated: list[Tensor] = []
        """Parts of shards that are not to count."""
        places, of_groups = list[int](), list[int]()
        number = {group: i for i, group in enumerate(order)}
        for g in groups:
            begin = len(self._shards)
            for place, shard in zip(g.window.places, g.window.shards, strict=True):
                for parameter, ranges in g.optimizer.held_in_node(*place).items():
                    if repeats and not parameter.tensor_model_parallel:
                        local = ranges["gbuf_local"]
                        self._repeated.append(shard[local.start : local.end])
                        places.append(len(self._shards))
                self._shards.append(shard)
                of_groups.append(number[g.group])
            g.window.before_crossing = lambda i, begin=begin: self._measure(begin + i)
        self._groups = len(order)
        self._place_of = torch.tensor(places, dtype=torch.long, device=device)
        self._group_of = torch.tensor(of_groups, dtype=torch.long, device=device)
        self._crossing = torch.zeros(len(self._shards), dtype=torch.float64, device=device)
        """Of each shard that crosses at this step, as it was before; of the others -1."""
        self._parts: list[list[Tensor]] = [[] for _ in self._shards]
        for i, part in zip(places, self._repeated, strict=True):
            self._parts[i].append(part)
        self.of_step: Tensor | None = None
        """float64 [sync groups of the model], once `finish` has returned."""

    def start_step(self) -> None:
        """Before the first backward pass of a step."""
        self._crossing.fill_(-1.0)

    def _measure(self, i: int) -> None:
        """A shard is about to cross; on the stream or thread of the wire."""
        square = _squares([self._shards[i]])[0]
        if self._parts[i]:
            square = square - _squares(self._parts[i]).sum()
        self._crossing[i].copy_(square)

    def finish(self, norms: list[Tensor]) -> None:
        """When what crosses has crossed.

        Args:
            norms: of the shards, in their order.
        """
        here = torch.stack(norms).double().square()
        if self._repeated:
            here = here.index_add(0, self._place_of, -_squares(self._repeated))
        found = torch.where(self._crossing >= 0, self._crossing, here)
        zeros = torch.zeros(self._groups, dtype=torch.float64, device=found.device)
        self.of_step = zeros.index_add(0, self._group_of, found)


def _squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double().square()

"""A ladder of sizes: width and depth that grow together, from the parameters wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from nlscale.config.units import human_count
from nlscale.errors import UserError

_DEEPEST = 10_000
_FARTHEST = 0.25  # from the target, as a share of it: beyond that a name would mislead


@dataclass(frozen=True)
class Ladder:
    """The rule: d_model is `width_per_layer` times the layers, in whole heads of `head_dim`.

    A fixed ratio of width to depth, as Kaplan et al. 2020 (section 3.1) found the loss to depend on
    it only weakly, keeps a ladder a family. **[choice]** Parameters are those of a Transformer of
    that size, 12 layers d_model^2 + 2 vocabulary d_model: every mixer has that many within a few
    percent, and so the same rungs.
    """

    KEYS: ClassVar = ("model.layers", "model.d_model", "model.heads")
    """What a rung sets."""

    width_per_layer: float
    head_dim: int

    def rung(self, name: str, target: int, vocabulary: int) -> dict[str, Any]:
        """The keys of the model of this rule that comes closest to `target` parameters.

        Raises:
            UserError: the closest is more than 25 % away.
        """
        layers, below, above = 1, (0, math.inf), (0, math.inf)
        while True:
            above = (layers, self._parameters(layers, vocabulary))
            if above[1] >= target:
                break
            below, layers = above, layers + 1
            if layers > _DEEPEST:
                raise UserError(
                    f"size {name}: with width_per_layer {self.width_per_layer:g} and head_dim "
                    f"{self.head_dim} it needs more than {_DEEPEST:,} layers; use wider ones"
                )
        layers, found = min(below, above, key=lambda rung: abs(rung[1] - target))
        if abs(found - target) > _FARTHEST * target:
            raise UserError(
                f"size {name}: with width_per_layer {self.width_per_layer:g} and head_dim "
                f"{self.head_dim} the closest model has {human_count(found)} parameters "
                f"({layers} layers); use a smaller head_dim, or another target"
            )
        heads = self._heads(layers)
        return dict(zip(self.KEYS, (layers, heads * self.head_dim, heads), strict=True))

    def _heads(self, layers: int) -> int:
        return max(1, round(self.width_per_layer * layers / self.head_dim))

    def _parameters(self, layers: int, vocabulary: int) -> int:
        width = self._heads(layers) * self.head_dim
        return 12 * layers * width * width + 2 * vocabulary * width

"""An evaluation of one's own (`examples.additions` adds it as `evaluate=[backwards]`).

The loss on held-out text that is read from its end: what is left of what was learned when the order
of tokens is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlscale.data import Samples, TokenShards
from nlscale.evaluate.loss import loss
from nlscale.step.trainer import Trainer


@dataclass
class Backwards:
    """Samples whose tokens stand in the opposite order."""

    samples: Samples

    @property
    def shards(self) -> TokenShards:
        return self.samples.shards

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        return self.samples[number][::-1].copy()

    def mask(self, number: int) -> NDArray[np.bool_] | None:
        mask = self.samples.mask(number)
        return None if mask is None else mask[::-1].copy()


def backwards(trainer: Trainer, samples: Samples) -> dict[str, float | None]:
    """`loss` and `bits_per_byte`, as of the text itself."""
    return loss(trainer, Backwards(samples))  # type: ignore[arg-type]

"""Other weights in the place of the model's for a while, such as an average of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nlscale.step.trainer import Trainer


@contextmanager
def stand_in(trainer: Trainer, kind: str) -> Iterator[None]:
    """Let what hooks keep of each parameter be its weights, until the block is left.

    Collective, as it gathers parameters as after an update.

    Args:
        trainer: between two steps.
        kind: of `Trainer.kept`.
    """
    kept = trainer.kept[kind]
    own = {weights: weights.detach().clone() for weights in kept}
    _set(trainer, kept)
    try:
        yield
    finally:
        _set(trainer, own)


def _set(trainer: Trainer, values: dict[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        for weights, value in values.items():
            weights.copy_(value)
    trainer.optimizer.gather_parameters()

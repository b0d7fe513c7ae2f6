"""What every mixer is to a block: a module over a sequence, with a state that can be carried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, ModelConfig
from nlscale.errors import UserError
from nlscale.ops.documents import Documents


class Way(NamedTuple):
    """A way to compute what lies between a mixer's projections."""

    name: str
    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """What the result is differentiated by."""


class Mixer(nn.Module):
    """x [sequence, batch, d_model] -> the same shape, causal; heads split over the tensor group.

    It is made of its facts, the sizes of the model, what megatron-core's layers need to know, the
    standard deviation of the projection into the residual stream, whether to compute what lies
    between the projections again in the backward pass, and whether kernels for GPUs may be used.
    """

    def forward(
        self, x: Tensor, state: Any = None, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        """Mix a piece of the sequences.

        Args:
            x: [sequence, batch, d_model].
            state: where an earlier piece ended; None at the start.
            documents: where whole samples are to be begun anew; None: nowhere.

        Returns:
            What is to be added to the residual stream, and the state after the piece.
        """
        raise NotImplementedError

    def projected(self) -> list[str]:
        """Names of the sections of `project`, in their order, for who looks into the model."""
        project: Any = self.project
        return [f"projection {i}" for i in range(len(project.weight.sections))]

    @staticmethod
    def kernel_errors(
        facts: Any, config: Config, dtype: torch.dtype, device: torch.device
    ) -> dict[str, dict[str, float]]:
        """How far its kernels are from float64 on this device, as this run launches them.

        Args:
            facts: of this mixer.
            config: the run.
            dtype: of activations.
            device: where it runs.

        Returns:
            Relative errors by what is off, by the library whose kernels they are; none where it
            uses no kernels.
        """
        return {}

    @staticmethod
    def ways(
        facts: Any,
        model: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Way]:
        """Every way to compute its core, on random inputs, for `nlscale bench scan`.

        Raises:
            UserError: it has none that can be run alone.
        """
        raise UserError(f"model.mixer={model.mixer} has no core that can be run alone")

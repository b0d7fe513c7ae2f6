"""What every mixer is to a block: a module over a sequence, with a state that can be carried."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, ModelConfig
from nlscale.errors import UserError
from nlscale.model.mixers.state import State as State
from nlscale.ops.documents import Documents


class Way(NamedTuple):
    """A way to compute what lies between a mixer's projections."""

    name: str
    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """What the result is differentiated by."""


def check_takes_lengths(mixer: nn.Module) -> None:
    """Refuse rows of different lengths where a mixer cannot tell them apart.

    Raises:
        UserError: its `forward` takes no lengths.
    """
    if "lengths" not in inspect.signature(mixer.forward).parameters:
        raise UserError(
            f"the mixer {type(mixer).__name__} reads all rows alike: its forward takes no lengths "
            f"(docs/how-to/add-a-mixer.md); feed rows of equal lengths, or one at a time"
        )


class OneToken:
    """One token of every row through a mixer, without a derivative: of a kind of its own where that
    is faster than a piece of one token.

    It is made once for a stream, so that what depends on weights alone is worked out once; the
    whole mixer is in this process.
    """

    capturable: ClassVar[bool] = False
    """Whether a CUDA graph may hold the call: it then writes the state in place, and does nothing
    that depends on where the rows are, which is left to `advance`."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer

    def __call__(self, x: Tensor, state: Any, active: Tensor | None) -> tuple[Tensor, Any]:
        """Mix the token.

        Args:
            x: [batch, d_model].
            state: where the rows are, which may be written to and shares no memory.
            active: rows that read their token, bool [batch], on the CPU; None: all.

        Returns:
            What is to be added to the residual stream, [batch, d_model], and the state after it.
        """
        if active is not None:
            check_takes_lengths(self.mixer)
        lengths = () if active is None else (None, active.long())
        y, state = self.mixer(x[None], state, *lengths)
        return y[0], state

    def advance(self, state: Any, active: Tensor | None) -> None:
        """What the host keeps account of, after the call."""


class Mixer(nn.Module):
    """x [sequence, batch, d_model] -> the same shape, causal; heads split over the tensor group.

    It is made of its facts, the sizes of the model, what megatron-core's layers need to know, the
    standard deviation of the projection into the residual stream, whether to compute what lies
    between the projections again in the backward pass, and whether kernels for GPUs may be used.

    What it carries is a `State`, or rows of a stream can be neither chosen nor saved.
    """

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix a piece of the sequences.

        Args:
            x: [sequence, batch, d_model].
            state: where an earlier piece ended, which may be written to; None at the start.
            documents: where whole samples are to be begun anew; None: nowhere.
            lengths: how many of its tokens each row reads, int64 [batch], on the CPU; what follows
                them changes nothing. None: all.

        Returns:
            What is to be added to the residual stream, and the state after the piece.
        """
        raise NotImplementedError

    def one_token(self) -> OneToken:
        """For reading token by token."""
        return OneToken(self)

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

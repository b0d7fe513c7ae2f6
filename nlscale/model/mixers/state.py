"""What a mixer carries from one piece of the sequences to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

_State = TypeVar("_State", bound="State")


@dataclass
class State:
    """Base of the dataclasses that mixers carry. Fields are tensors, the batch first, or None;
    those of integers are on the CPU.

    A row begins with zeros; a state for which that is not so has a `reset` of its own. One that is
    given to a mixer may be written to: it is not to be used again.
    """

    def select(self: _State, rows: Tensor) -> _State:
        """The state of these rows, int64 on the CPU, in their order and also one several times.

        Shares no memory with this one.
        """
        return type(self)(**{k: _rows(x, rows) for k, x in self._fields().items()})

    def reset(self, rows: Tensor) -> None:
        """Begin these rows anew, int64 on the CPU."""
        for x in self._fields().values():
            if x is not None:
                x[rows.to(x.device)] = 0

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for `of`; they may share memory with it."""
        return {k: x for k, x in self._fields().items() if x is not None}

    @classmethod
    def of(cls: type[_State], tensors: dict[str, Tensor], device: torch.device) -> _State:
        """What `tensors` returned; what is not of integers on this device."""
        moved = {k: x.to(device if x.is_floating_point() else "cpu") for k, x in tensors.items()}
        return cls(**{f.name: moved.get(f.name) for f in fields(cls)})

    def restored(self: _State, tensors: dict[str, Tensor], device: torch.device) -> _State:
        """A state like this one of what the `tensors` of another returned."""
        return type(self).of(tensors, device)

    def form(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of each of `tensors` the dtype, and the sizes that are the same for any rows."""
        return {k: (x.dtype, tuple(x.shape[1:])) for k, x in self.tensors().items()}

    def fits(self, mixer: Any, lengths: Tensor) -> bool:
        """Whether this mixer can go on from it.

        Args:
            mixer: one whose states have this `form`.
            lengths: tokens that each row has read, int64 [batch], on the CPU.
        """
        return True

    def _fields(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def last_inputs(tail: Tensor, fed: Tensor, lengths: Tensor | None) -> Tensor:
    """The last inputs of a convolution after a piece, [batch, window - 1, channels].

    Args:
        tail: those before it, [window - 1, batch, channels].
        fed: what the convolution was fed with, [sequence, batch, channels].
        lengths: how many of them each row reads, int64 [batch], on the CPU; None: all.
    """
    before, length = len(tail), len(fed)
    if lengths is None:
        last = torch.cat([tail, fed[max(0, length - before) :]])
        return last[len(last) - before :].transpose(0, 1)
    place = (lengths[:, None] + torch.arange(before)).to(fed.device)
    return torch.cat([tail, fed]).transpose(0, 1).take_along_dim(place[..., None], 1)


def _rows(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(0, rows.to(x.device))

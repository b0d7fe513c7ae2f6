"""Keys and values so far, what attention carries from one piece of the sequences to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlscale.model.mixers.state import State


@dataclass
class AttentionState(State):
    """Keys, rotated, and values, [batch, heads, room, d], and how many of them there are.

    There may be room for more. It is finite what stands there, since attention multiplies it by 0.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    """Of each row, int64 [batch], on the CPU."""

    @classmethod
    def begun(cls, k: Tensor, v: Tensor, lengths: Tensor | None) -> AttentionState:
        """Of the first piece; see `add`."""
        read = torch.full((len(k),), k.shape[2]) if lengths is None else lengths.clone()
        return cls(k, v, read)

    def past(self) -> int | Tensor:
        """`lengths`, or the one that all rows have."""
        first, last = (int(x) for x in self.lengths.aminmax())
        return first if first == last else self.lengths

    def add(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put the keys and values of a piece behind those of each row.

        Args:
            k, v: [batch, heads, time, d].
            lengths: how many of them each row has read, int64 [batch], on the CPU; None: all.

        Returns:
            Keys and values up to the last of any row.
        """
        time, past = k.shape[2], self.lengths
        first, last = (int(x) for x in past.aminmax())
        end = last + time
        self._make_room(end)
        if first == last:
            self.keys[:, :, first:end], self.values[:, :, first:end] = k, v
        else:  # what is not read as well: it stands beyond the row's length
            place = (past[:, None] + torch.arange(time)).to(k.device)[:, None, :, None]
            self.keys.scatter_(2, place.expand_as(k), k)
            self.values.scatter_(2, place.expand_as(v), v)
        self.lengths = past + (time if lengths is None else lengths)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _make_room(self, tokens: int) -> None:
        """For so many in all, doubling what there is.

        Where gradients are taken the old keys and values may be wanted again: then always anew.
        """
        room = self.keys.shape[2]
        if tokens <= room and not torch.is_grad_enabled():
            return
        room = max(tokens, 0 if torch.is_grad_enabled() else 2 * room)
        self.keys, self.values = (_longer(x, room) for x in (self.keys, self.values))

    def reset(self, rows: Tensor) -> None:
        self.lengths[rows] = 0

    def tensors(self) -> dict[str, Tensor]:
        longest = int(self.lengths.max())
        return {
            "keys": self.keys[:, :, :longest].contiguous(),
            "values": self.values[:, :, :longest].contiguous(),
            "lengths": self.lengths,
        }

    def form(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            k: (dtype, (*sizes[:1], *sizes[2:])) for k, (dtype, sizes) in super().form().items()
        }


def _longer(x: Tensor, room: int) -> Tensor:
    """x with zeros behind it, [batch, heads, room, d]."""
    longer = x.new_zeros(*x.shape[:2], room, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer

"""Keys and values so far, what attention carries from one piece of the sequences to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        if not torch.is_grad_enabled():  # a part of the projection, all of which it would keep
            v = v.clone(memory_format=torch.contiguous_format)
        return cls(k, v, read)

    def past(self) -> int | Tensor:
        """`lengths`, or the one that all rows have."""
        first, last = (int(x) for x in self.lengths.aminmax())
        return first if first == last else self.lengths

    def add(
        self, k: Tensor, v: Tensor, lengths: Tensor | None
    ) -> tuple[AttentionState, Tensor, Tensor]:
        """Put the keys and values of a piece behind those of each row.

        Without gradients they are written into this state. With them it stays as it is: its keys
        may be wanted again in the backward pass, which may also compute the piece again.

        Args:
            k, v: [batch, heads, time, d].
            lengths: how many of them each row has read, int64 [batch], on the CPU; None: all.

        Returns:
            The state after the piece, and keys and values up to the last of any row.
        """
        time, past = k.shape[2], self.lengths
        first, last = (int(x) for x in past.aminmax())
        end = last + time
        after = past + (time if lengths is None else lengths)
        place = None  # that of each row's; what is not read as well: beyond the row's length
        if first < last:
            place = (past[:, None] + torch.arange(time)).to(k.device)[:, None, :, None]
        if torch.is_grad_enabled():
            k, v = (_after(x, last, new, place) for x, new in ((self.keys, k), (self.values, v)))
            return AttentionState(k, v, after), k, v
        self._make_room(end)
        for x, new in ((self.keys, k), (self.values, v)):
            if place is None:
                x[:, :, first:end] = new
            else:
                x.scatter_(2, place.expand_as(new), new)
        self.lengths = after
        return self, self.keys[:, :, :end], self.values[:, :, :end]

    def _make_room(self, tokens: int) -> None:
        """For so many in all, doubling what there is; anew where a backward pass may want it."""
        room = self.keys.shape[2]
        differentiated = self.keys.requires_grad or self.values.requires_grad
        if tokens <= room and not differentiated:
            return
        room = max(tokens, 2 * room)
        self.keys, self.values = (_longer(x, room) for x in (self.keys, self.values))

    def fits(self, mixer: Any, lengths: Tensor) -> bool:
        """There are the keys and values of all that was read."""
        same = torch.equal(self.lengths, lengths) and self.keys.shape == self.values.shape
        return same and int(lengths.max()) <= self.keys.shape[2]

    def reset(self, rows: Tensor) -> None:
        self.lengths[rows] = 0

    def tensors(self) -> dict[str, Tensor]:
        longest = int(self.lengths.max())
        return {
            "keys": self.keys[:, :, :longest],
            "values": self.values[:, :, :longest],
            "lengths": self.lengths,
        }

    def form(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            k: (dtype, (*sizes[:1], *sizes[2:])) for k, (dtype, sizes) in super().form().items()
        }


@dataclass
class WindowState(State):
    """The last keys, rotated, and values of each row, as many as a window holds beside a token.

    They stand at the end, and before them zeros, which are not seen.
    """

    keys: Tensor
    """[batch, heads, window - 1, d]."""
    values: Tensor
    lengths: Tensor
    """Tokens of each row so far, int64 [batch], on the CPU."""

    @classmethod
    def begun(cls, like: Tensor, window: int) -> WindowState:
        """Of no tokens; for keys and values like these, [batch, heads, time, d]."""
        zeros = like.new_zeros(*like.shape[:2], window - 1, like.shape[3])
        return cls(zeros, zeros, torch.zeros(len(like), dtype=torch.long))

    def past(self) -> int | Tensor:
        """`lengths`, or the one that all rows have."""
        first, last = (int(x) for x in self.lengths.aminmax())
        return first if first == last else self.lengths

    def add(
        self, k: Tensor, v: Tensor, lengths: Tensor | None
    ) -> tuple[WindowState, Tensor, Tensor]:
        """Put the keys and values of a piece behind those of each row; this state stays.

        Args:
            k, v: [batch, heads, time, d].
            lengths: how many of them each row has read, int64 [batch], on the CPU; None: all.

        Returns:
            The state after the piece; keys and values with those before, [batch, heads,
            window - 1 + time, d].
        """
        before, time = self.keys.shape[2], k.shape[2]
        k, v = (torch.cat(pair, 2) for pair in ((self.keys, k), (self.values, v)))
        if lengths is None:
            last_k, last_v = (x[:, :, time:].clone() for x in (k, v))
        else:
            place = (lengths[:, None] + torch.arange(before)).to(k.device)[:, None, :, None]
            last_k, last_v = (x.take_along_dim(place, 2) for x in (k, v))
        after = self.lengths + (time if lengths is None else lengths)
        return WindowState(last_k, last_v, after), k, v

    def fits(self, mixer: Any, lengths: Tensor) -> bool:
        """It is of as many tokens."""
        return torch.equal(self.lengths, lengths)


def _after(x: Tensor, length: int, new: Tensor, place: Tensor | None) -> Tensor:
    """x up to a length, and what is new behind it, or at places [batch, 1, time, 1]."""
    if place is None:
        return torch.cat([x[:, :, :length], new], 2)
    behind = torch.cat([x[:, :, :length], torch.zeros_like(new)], 2)
    return behind.scatter(2, place.expand_as(new), new)


def _longer(x: Tensor, room: int) -> Tensor:
    """x with zeros behind it, [batch, heads, room, d]."""
    longer = x.new_zeros(*x.shape[:2], room, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer

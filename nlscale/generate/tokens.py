"""Token ids as they are given, and how many of each row are read."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlscale.errors import UserError

Tokens = Tensor | NDArray[Any] | Sequence[Sequence[int]]
"""Token ids [batch, n], integers of any width."""
Integers = Tensor | NDArray[Any] | Sequence[int]
"""[n], of any width."""


def is_whole(value: object) -> bool:
    """Whether it is an integer by its type, of Python or numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def listed(prompt: Iterable[Any], vocabulary: int) -> list[int]:
    """The ids of a prompt.

    Raises:
        UserError: it is no sequence of integers, or has ids that the tokenizer does not know.
    """
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise UserError(
            f"{prompt!r:.60} is no prompt; give a text, or a list of ids such as [1, 2, 3], and "
            f"several prompts as a list of these"
        ) from None
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise UserError(
            f"a prompt has ids from {min(ids)} to {max(ids)}, and the tokenizer knows 0 to "
            f"{vocabulary - 1}"
        )
    return ids


def shaped(tokens: Tokens) -> Tensor:
    """Ids [batch, n], int64, with n at least 1, whatever they are.

    Raises:
        UserError: tokens of another shape or type.
    """
    if not isinstance(tokens, Tensor):
        array = np.array(tokens)  # a copy: some arrays are read-only, which torch warns of
        if array.dtype.kind not in "iu":
            raise UserError(f"tokens of type {array.dtype} are no ids; give integers")
        tokens = torch.from_numpy(array.astype(np.int64))
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise UserError(f"tokens of type {tokens.dtype} are no ids; give integers")
    if tokens.dim() != 2 or not tokens.numel():
        raise UserError(
            f"tokens of shape {tuple(tokens.shape)}; give [batch, n] with n at least 1, such "
            f"as [ids] for one sequence"
        )
    return tokens.long()


def known(tokens: Tensor, vocabulary: int) -> Tensor:
    """The same, where the embedding has rows for all.

    Raises:
        UserError: ids beyond the vocabulary.
    """
    least, most = (int(x) for x in tokens.aminmax())
    if least < 0 or most >= vocabulary:
        raise UserError(
            f"token ids run from {least} to {most}, and the model knows 0 to {vocabulary - 1}"
        )
    return tokens


def counted(lengths: Integers | None, batch: int, n: int) -> Tensor | None:
    """How many of n tokens each row reads, int64 [batch], on the CPU; None where that is all.

    Raises:
        UserError: other numbers than 0 to n, or not one a row.
    """
    if lengths is None:
        return None
    given = torch.as_tensor(lengths).cpu()
    fits = given.shape == (batch,) and not given.is_floating_point() and given.dtype != torch.bool
    if not fits or int(given.min()) < 0 or int(given.max()) > n:
        said = given.tolist() if given.numel() <= 8 else f"shape {tuple(given.shape)}"
        raise UserError(
            f"lengths {said} for {batch} rows of {n} tokens; give {batch} integers from 0 to {n}"
        )
    given = given.long()
    return None if int(given.min()) == n else given


def numbered(rows: Integers, batch: int) -> Tensor:
    """Numbers of rows, int64 [n], on the CPU.

    Raises:
        UserError: there is no such row, or they are none.
    """
    given = torch.as_tensor(rows).cpu()
    fits = given.dim() == 1 and given.numel() > 0 and not given.is_floating_point()
    if (
        not fits
        or given.dtype == torch.bool
        or not 0 <= int(given.min()) <= int(given.max()) < batch
    ):
        raise UserError(f"rows {rows!r} of a stream of {batch}; give some of 0 to {batch - 1}")
    return given.long()
